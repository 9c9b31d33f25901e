"""The core decides alike in every process: no decision hangs on the order of a set or on a hash seed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def digest(hash_seed: str) -> str:
    command = [sys.executable, "-m", "bench.core", "--digest"]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def test_two_hash_seeds_give_one_digest() -> None:
    first = digest("1")
    assert len(first.strip()) == 65
    assert first == digest("2")


@pytest.mark.slow
def test_many_hash_seeds_give_one_digest() -> None:
    assert len({digest(str(seed)) for seed in range(12)}) == 1
