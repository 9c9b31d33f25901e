"""The measurement of stored forms: its plain row must be without any error, and the others must not."""

from argparse import Namespace
from pathlib import Path

import pytest

from bench.kv_formats import measure
from workers.engines.checkpoint import create_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_what_comes_back_plain_is_exact_and_what_does_not_is_nearly(tmp_path: Path, family: str) -> None:
    create_checkpoint(tmp_path, family, 7, layers=2, hidden=64, intermediate=96)
    options = Namespace(model=tmp_path, tokens=200, prompts=2, output=6, dtype="float32")
    report = measure(tmp_path, options)
    plain, fp8, nvfp4 = report["forms"]
    errors = ("keys_rms", "keys_max", "values_rms", "values_max", "logits_rms", "logits_max", "divergence")
    assert [plain[name] for name in errors] == [0.0] * len(errors)
    assert (plain["equal_share"], plain["first_differences"]) == (1.0, [None, None])
    for name in ("keys_rms", "values_rms", "logits_rms"):
        assert 0 < fp8[name] < nvfp4[name] < 1
    assert 1 > fp8["bytes_share"] > nvfp4["bytes_share"]
