"""Profiles: every number has its source or its range, any can be overridden, and a bad one is answered with file and key."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.config import Precision
from orchestrator.core.cost.shapes import ModelShape
from orchestrator.profiles import catalog as catalog_file
from orchestrator.profiles.catalog import Catalog, CatalogError
from orchestrator.profiles.fields import CheckpointError, Fields
from orchestrator.profiles.model_config import architecture_of, model_fields

CATALOG = Catalog.load()
LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    return architecture_of(model_fields(Fields(Path("config.json"), config))).shape("m")


def sources() -> dict[str, str]:
    """Return the source of every published number in the packaged profiles, by `FILE.KEY`."""
    files = sorted(Path(catalog_file.__file__).parent.glob("*.toml"))
    entries = [(f"{path.stem}.{key}", entry) for path in files for key, entry in tomllib.loads(path.read_text()).items()]
    return {name: entry["source"] for name, entry in entries if isinstance(entry, dict) and "source" in entry}


def test_every_published_number_names_a_web_page() -> None:
    assert [name for name, source in sources().items() if not source.startswith("https://")] == []
    assert set(sources()) | {assumption.name for assumption in CATALOG.assumptions} == set(CATALOG.names)


def test_every_assumption_has_a_range_and_a_reason() -> None:
    assert [assumption.name for assumption in CATALOG.assumptions if assumption.low == assumption.high] == []
    named = {assumption.name for assumption in CATALOG.assumptions}
    assert named >= {"lp30.tdp_w", "lp30.owner_usd_per_hour", "lpx.link_bytes_per_s", "cmx.bytes_per_s"}
    # Estimates of prices differ, and nobody has measured Rubin.
    assert named >= {f"{chip}.owner_usd_per_hour" for chip in ("vr200", "gb300", "gb200", "h200")}
    assert {name for name in CATALOG.names if name.startswith("rubin.")} <= named


def test_every_chip_can_be_built() -> None:
    assert CATALOG.chips == ("gb200", "gb300", "h200", "lp30", "vr200")
    chips = {name: CATALOG.chip(name) for name in CATALOG.chips}
    assert [name for name, chip in chips.items() if not chip.is_gpu] == ["lp30"]
    assert set(chips["lp30"].flops) == {Precision.FP8}
    assert set(chips["h200"].flops) == {Precision.FP8, Precision.BF16}
    storage = chips["vr200"].storage
    assert storage is not None
    assert storage.name == "cmx"


def test_memory_beside_a_chip_has_a_capacity_and_a_network_has_none() -> None:
    vr200, h200 = CATALOG.chip("vr200"), CATALOG.chip("h200")
    assert vr200.host is not None
    assert vr200.storage is not None
    assert h200.host is not None
    assert (vr200.host.capacity_bytes, vr200.storage.capacity_bytes, h200.host.capacity_bytes) == (750e9, 16e12, 250e9)
    assert vr200.scale_up.capacity_bytes == 0.0


def test_experts_have_their_own_efficiency_where_their_chips_practice_names_one() -> None:
    gb200, lp30 = CATALOG.chip("gb200"), CATALOG.chip("lp30")
    for precision, own in ((Precision.NVFP4, "nvfp4_"), (Precision.FP8, ""), (Precision.BF16, "")):
        assert gb200.matmul_efficiency[precision] == CATALOG.number(f"blackwell.{own}matmul_efficiency")
        assert gb200.expert_efficiency[precision] == CATALOG.number(f"blackwell.{own}expert_efficiency")
    assert lp30.expert_efficiency == lp30.matmul_efficiency


def test_the_lpx_fabric_is_as_quick_as_published_for_each_number_of_chips() -> None:
    # Gigabytes of reachable memory, half of one a chip, and microseconds: Hot Chips 2026.
    published = {8: 0.35, 64: 0.75, 128: 1.15, 384: 1.60, 640: 2.05, 896: 2.50, 1152: 2.95}
    for size, microseconds in published.items():
        latency_s = CATALOG.chip("lp30", 2 * size).scale_up.latency_s
        assert latency_s == pytest.approx(microseconds * 1e-6, rel=0.04)
        assert CATALOG.chip("lp30", 2 * size).ffn_floor_s == pytest.approx(latency_s * CATALOG.number("lpx.ffn_hops"))


@pytest.mark.parametrize(
    ("ranks", "tokens", "dispatch", "combine"),
    [
        *((8, 64, 22.3, 34.1), (8, 256, 50.8, 53.0), (8, 2048, 311.8, 322.6), (16, 256, 54.8, 57.0)),
        *((32, 256, 61.5, 59.7), (32, 2048, 373.7, 369.5), (64, 1024, 209.4, 199.2), (64, 2048, 399.2, 372.1)),
    ],
)
def test_an_all_to_all_on_nvlink_5_takes_what_was_measured(ranks: int, tokens: int, dispatch: float, combine: float) -> None:
    # Microseconds for tokens to 8 experts of hidden 7168 in BF16: TensorRT-LLM's blog 18.
    size = tokens * 8 * 7168 * 2
    seconds = CATALOG.link("nvlink5").all_to_all_seconds(ranks, size, size)
    assert seconds == pytest.approx((dispatch + combine) * 1e-6, rel=0.05)


def test_nvlink_6_takes_nvlink_5s_all_to_all_at_its_own_rate() -> None:
    def seconds(link: str, size: float, **numbers: float) -> float:
        return Catalog.load(numbers).link(link).all_to_all_seconds(8, size, size)

    assert seconds("nvlink6", 2e9) - seconds("nvlink6", 1e9) == pytest.approx(
        (seconds("nvlink5", 2e9) - seconds("nvlink5", 1e9)) / 2
    )
    assert seconds("nvlink6", 0.0) == seconds("nvlink5", 0.0)
    assert seconds("nvlink6", 0.0, **{"nvlink6.exchange_time": 0.5}) == pytest.approx(seconds("nvlink5", 0.0) / 2)
    assert seconds("nvlink6", 1e9, **{"nvlink6.efficiency": 0.85}) < seconds("nvlink6", 1e9)


def test_every_packaged_number_and_both_ends_of_its_range_may_be_set() -> None:
    for name in CATALOG.names:
        assert CATALOG.overridden({name: CATALOG.number(name)}).number(name) == CATALOG.number(name)
    for one in CATALOG.assumptions:
        assert [CATALOG.overridden({one.name: end}).number(one.name) for end in (one.low, one.high)] == [one.low, one.high]


def test_any_number_can_be_overridden() -> None:
    changed = Catalog.load({"vr200.memory_bytes_per_s": 19.2e12, "lp30.tdp_w": 500.0, "economics.all_in_per_tdp": 2.0})
    assert changed.chip("vr200").memory_bytes_per_s == 19.2e12
    assert changed.chip("lp30").kw == 1.0
    assert CATALOG.chip("vr200").memory_bytes_per_s != 19.2e12


def test_rental_changes_prices_and_nothing_else() -> None:
    owned, rented = CATALOG.chip("gb200"), Catalog.load({"economics.rental": 1}).chip("gb200")
    assert owned.usd_per_hour == CATALOG.number("gb200.owner_usd_per_hour")
    assert rented.usd_per_hour == CATALOG.number("gb200.rental_usd_per_hour")
    assert owned.kw == rented.kw


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"lp30.tdp": 1.0}, r"lp30\.tdp: no such number; near it: lp30\.tdp_w"),
        ({"lp30.tdp_w": -1.0}, r"lp30\.tdp_w: must be a number of 0 or more, is -1\.0"),
        ({"lp30.tdp_w": float("nan")}, r"lp30\.tdp_w: must be a number of 0 or more, is nan"),
        ({"h200.memory_bytes_per_s": 0.0}, r"h200\.memory_bytes_per_s: must be a number over 0, is 0\.0"),
        ({"h200.memory_bytes_per_s": 5e-324}, r"h200\.memory_bytes_per_s: must be a number over 0, is 5e-324"),
        ({"lp30.tdp_w": 1e300}, r"lp30\.tdp_w: must be at most 1e\+24, is 1e\+300"),
        ({"lp30.tdp_w": float("inf")}, r"lp30\.tdp_w: must be at most 1e\+24, is inf"),
        ({"economics.rental": 5}, r"economics\.rental: must be at most 1, is 5"),
        ({"nvlink6.efficiency": 1.5}, r"nvlink6\.efficiency: must be at most 1, is 1\.5"),
        ({"practice.acceptance": 2}, r"practice\.acceptance: must be at most 1, is 2"),
        ({"vr200.domain_chips": 0.5}, r"vr200\.domain_chips: must be a number of 1 or more, is 0\.5"),
    ],
)
def test_a_wrong_override_is_named(overrides: dict[str, float], problem: str) -> None:
    with pytest.raises(CatalogError, match=f"^{problem}"):
        Catalog.load(overrides)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("x = 3", r"{ value, unit, source } or { value, low, high, unit, why }"),
        ('x = { value = 3, unit = "s" }', r"{ value, unit, source }"),
        ('x = { value = 3, unit = "s", source = "" }', "source must be a text"),
        ('x = { value = 3, low = 4, high = 5, unit = "s", why = "guess" }', "3 is not between 4 and 5"),
        ('x = { value = "3", unit = "s", source = "page" }', "value must be a number"),
        ("x = ", "cannot be read"),
    ],
)
def test_canary_a_profile_without_source_or_range_is_refused(
    line: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.toml").write_text(line)
    monkeypatch.setattr(catalog_file, "_FOLDER", tmp_path)
    with pytest.raises(CatalogError, match=rf"^bad\.toml: .*{problem}"):
        Catalog.load()


# Model shapes


@pytest.mark.parametrize("name", CATALOG.shapes)
def test_a_built_in_model_has_the_parameters_it_is_known_for(name: str) -> None:
    # Total and active parameters in billions, by the models' own cards.
    known = {"deepseek-v3": (671, 37), "gpt-oss-120b": (117, 5.1), "kimi-k2": (1026, 32), "llama-3.1-70b": (70.6, 70)}
    known["qwen3-235b-a22b"] = (235, 22)
    shape = CATALOG.shape(name)
    total, active = known[name]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.03)


def test_latent_and_grouped_heads_cache_what_they_should() -> None:
    elements = {name: CATALOG.shape(name).kv_elements for name in CATALOG.shapes}
    assert elements["kimi-k2"] == elements["deepseek-v3"] == 61 * (512 + 64)
    assert elements["qwen3-235b-a22b"] == 94 * 2 * 4 * 128
    # Half of the layers see 128 tokens only.
    assert elements["gpt-oss-120b"] == 18 * 2 * 8 * 64


def test_a_config_json_is_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shape = CATALOG.shape(str(tmp_path))
    assert (shape.layers, shape.dense_layers, shape.experts, shape.head_dim) == (2, 2, 0, 16)
    assert CATALOG.shape(str(tmp_path / "config.json")).parameters == shape.parameters


def test_the_families_name_their_experts_differently() -> None:
    deepseek = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    first_dense = shape_of({**LLAMA, **deepseek, "first_k_dense_replace": 1})
    assert (first_dense.experts, first_dense.dense_layers, first_dense.shared_intermediate) == (8, 1, 32)
    gpt_oss = shape_of({**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2})
    assert (gpt_oss.dense_layers, gpt_oss.expert_intermediate) == (0, 128)
    qwen = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    assert shape_of({**LLAMA, **qwen, "decoder_sparse_step": 2}).dense_layers == 1
    assert shape_of({**LLAMA, **qwen, "mlp_only_layers": [0, 1]}).dense_layers == 2


def test_windows_come_by_layer_or_for_the_upper_layers() -> None:
    kinds = ["sliding_attention", "full_attention"]
    assert shape_of({**LLAMA, "layer_types": kinds, "sliding_window": 7}).windowed_layers == 1
    assert shape_of({**LLAMA, "sliding_window": 7, "max_window_layers": 1}).windowed_layers == 1
    assert shape_of({**LLAMA, "sliding_window": 7, "use_sliding_window": False}).windowed_layers == 0
    assert shape_of({"text_config": {**LLAMA, "sliding_window": 7}}).windowed_layers == 2


@pytest.mark.parametrize(
    ("fields", "windowed"),
    [
        # Gemma 3 27B: every sixth of 62 layers sees everything, by its own word or by its family's.
        ({"num_hidden_layers": 62, "sliding_window_pattern": 6}, 52),
        ({"num_hidden_layers": 62, "model_type": "gemma3_text"}, 52),
        # gpt-oss: the second of each two.
        ({"num_hidden_layers": 36, "model_type": "gpt_oss"}, 18),
        ({"num_hidden_layers": 36, "model_type": "mistral"}, 36),
    ],
)
def test_windows_come_by_a_pattern_where_layers_are_not_listed(fields: dict[str, object], windowed: int) -> None:
    shape = shape_of({**LLAMA, "sliding_window": 7, **fields})
    assert (shape.windowed_layers, shape.window_tokens) == (windowed, 7)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"vocab_size": "many"}, "vocab_size: must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be a whole number of 1 or more, is 0"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: 'linear_attention' is not known"),
        ({"model_type": 3, "sliding_window": 7}, "model_type: must be a text"),
        # DeepSeek-V3.2, Qwen3-Next and Llama 4, whose layers would be counted as if they were all alike.
        ({"index_topk": 2048}, "index_topk: attention to chosen tokens only is not known"),
        ({"full_attention_interval": 4}, "full_attention_interval: linear attention .* is not known"),
        ({"interleave_moe_layer_step": 2}, "interleave_moe_layer_step: dense FFNs .* is not known"),
        ({"intermediate_size_mlp": 16384}, "intermediate_size_mlp: dense FFNs .* is not known"),
        ({"layer_types": [["full_attention"], "full_attention"]}, r"layer_types: \['full_attention'\] is not known"),
        ({"num_experts": 4, "num_experts_per_tok": 1, "mlp_only_layers": [[1]]}, r"mlp_only_layers: must be whole .* has \[1\]"),
        ({"hidden_size": 10**400}, r"hidden_size: must be at most 4294967296, is 10000*\.\.\.$"),
        ({"hidden_size": 1 << 20_000}, r"hidden_size: must be at most 4294967296, is too long to be shown \(int\)"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers: must be at most 4096, is 1000000"),
        ({"layer_types": ["full_attention"]}, r"layer_types: must have an entry a layer \(2\), has 1"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, r"num_experts_per_tok: must be at most the number of experts \(4\), is 5"),
    ],
)
def test_an_unusable_config_is_answered_with_its_field(change: dict[str, object], problem: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: {problem}"):
        shape_of({**LLAMA, **change})


def test_an_unknown_model_or_chip_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"^kimi-k9: .*those are: deepseek-v3, gpt-oss-120b, kimi-k2"):
        CATALOG.shape("kimi-k9")
    with pytest.raises(CatalogError, match=r"^b100: no such chip; there are: gb200"):
        CATALOG.chip("b100")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CatalogError, match=r"^config\.json: must hold a JSON object"):
        CATALOG.shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CatalogError, match=r"^config\.json: not readable as JSON: maximum recursion depth"):
        CATALOG.shape(str(tmp_path))
    with pytest.raises(CatalogError, match=r"^x*: File name too long"):
        CATALOG.shape("x" * 300)
