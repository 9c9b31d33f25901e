"""The import contracts of pyproject.toml hold, and a violation is noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("machine", ["cluster", "node", "cost"])
def test_canary_a_clock_in_the_core_is_noticed(tree: Path, machine: str) -> None:
    (tree / "orchestrator" / "core" / machine / "__init__.py").write_text(
        '"""Has a clock."""\n\nimport time\n\nNOW = time.time()\n'
    )
    report = lint(tree)
    assert report.returncode == 1
    assert f"orchestrator.core.{machine} -> time" in report.stdout


@pytest.mark.parametrize("folder", ["orchestrator", "orchestrator/core", "orchestrator/core/cluster", "orchestrator/core/cost"])
def test_canary_a_file_without_a_layer_is_noticed(tree: Path, folder: str) -> None:
    (tree / folder / "stray.py").write_text('"""Imports nothing and is imported by nobody."""\n')
    report = lint(tree)
    assert report.returncode == 1
    assert f"{folder.replace('/', '.')}.stray" in report.stdout


def test_canary_an_import_that_goes_up_is_noticed(tree: Path) -> None:
    path = tree / "orchestrator" / "wire" / "codec.py"
    path.write_text(path.read_text() + "\nimport orchestrator.live.driver  # noqa\n")
    report = lint(tree)
    assert report.returncode == 1
    assert "orchestrator.wire.codec -> orchestrator.live.driver" in report.stdout
