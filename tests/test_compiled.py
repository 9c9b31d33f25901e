"""The core compiled to C decides as it does in Python: its own tests and the simulator's pass with it, on the same traces."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: A module that is compiled, and what says which one is imported.
WHICH = "import orchestrator.core.kvpool as module; print(module.__file__)"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables with which Python imports the compiled packages, and the tests from here."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    place = tmp_path_factory.mktemp("compiled")
    made = [f"COMPILED={place / 'packages'}", "compiled"]
    subprocess.run(["make", *made], cwd=ROOT, check=True, capture_output=True, timeout=1100)
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": f"{place / 'packages'}:{ROOT}"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_compiled_passes_the_tests_of_what_is_not(environment: dict[str, str]) -> None:
    found = subprocess.run([sys.executable, "-c", WHICH], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith(".so")
    # Canaries break parts of what is looked at, which those that are compiled do not let them do.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core", "tests/sim", "-k", "not canary"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
