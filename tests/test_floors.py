"""The import contracts of pyproject.toml hold, and a violation is noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "workers", "bench")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the packages of a tree, as `lint-imports` does."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_every_import_contract_is_kept() -> None:
    report = lint(ROOT)
    assert report.returncode == 0, report.stdout + report.stderr


def test_canary_a_clock_in_the_core_and_an_unplaced_file_are_noticed(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "orchestrator" / "core" / "stray.py").write_text('"""Has no place."""\n\nimport time\n\nNOW = time.time()\n')
    report = lint(tmp_path)
    assert report.returncode == 1
    assert "orchestrator.core.stray -> time" in report.stdout
    assert "missing layers" in report.stdout.lower() or "stray" in report.stdout
