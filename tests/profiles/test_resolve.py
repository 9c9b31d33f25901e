"""Resolved clusters: the shipped files are complete, memory is counted by hand, and what does not fit says by how much."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli.cluster_file import FOLDER, read_cluster
from orchestrator.core.config import (
    ClusterConfig,
    ConfigError,
    DecodeMode,
    EngineConfig,
    HardwareConfig,
    KvFormat,
    ModelConfig,
    PoolConfig,
    Precision,
    SchedulerConfig,
    SpeculationConfig,
    SpeculationMethod,
    StoreConfig,
)
from orchestrator.core.cost.costs import step_seconds
from orchestrator.core.types import CostProfile, PoolKind, PoolName
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import Below, BlockBytes, machine_of, resolve
from tests.builders import some

CATALOG = Catalog.load()
FILES = sorted((FOLDER / "sim").glob("*.toml"))
POOL = PoolName("pool")


def cluster(hardware: HardwareConfig, shape: str = "kimi-k2", **engine: object) -> ClusterConfig:
    settings = EngineConfig(**{"memory_fraction": 0.9, **engine})  # pyright: ignore[reportArgumentType]
    pool = PoolConfig(name=POOL, kind=PoolKind.AGGREGATED, engine=settings, hardware=hardware)
    return ClusterConfig(models={"default": ModelConfig(shape=shape)}, pools=(pool,))


RUBIN = HardwareConfig(chip="vr200", group_nodes=8, weights=Precision.NVFP4, activations=Precision.NVFP4)
WITH_LPX = replace(RUBIN, mode=DecodeMode.AFD, ffn_chip="lp30", ffn_chips=2304)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_shipped_file_resolves_to_complete_pools(path: Path) -> None:
    resolved = resolve(read_cluster(path), CATALOG)
    assert resolved.hardware.keys() == {pool.name for pool in resolved.config.pools}
    for pool in resolved.config.pools:
        assert pool.engine.blocks * pool.engine.block_tokens > pool.engine.context_tokens_max > 0
        assert pool.profile.context_token_s > 0
        assert resolved.hardware[PoolName(pool.name)].usd_per_hour > 0


def test_the_clusters_are_there() -> None:
    names = {"gb200-nvl72", "gb300-nvl72", "h200", "vr-nvl72", "vr-nvl72-lpx"} | {
        "vr-nvl72-lpx-cadence",
        "vr-nvl72-lpx-afd-cadence",
    }
    assert {path.stem for path in FILES} == names


def test_a_pool_without_hardware_stays_as_it_is() -> None:
    config = cluster(HardwareConfig())
    assert resolve(config, CATALOG).config == config
    assert resolve(config, CATALOG).hardware == {}


@pytest.mark.parametrize(
    ("kv", "stored", "share"),
    [("bf16", "plain", 1.0), ("bf16", "fp8", 0.5), ("bf16", "nvfp4", 0.28125), ("fp8", "nvfp4", 0.5625), ("nvfp4", "fp8", 1.0)],
)
def test_blocks_below_a_pool_are_stored_in_no_more_bytes_than_in_it(kv: str, stored: str, share: float) -> None:
    config = cluster(replace(RUBIN, kv=Precision(kv)), kv_format_stored=KvFormat(stored))
    resolved = resolve(replace(config, store=StoreConfig(cpu_bytes=1 << 30)), CATALOG)
    assert resolved.below[POOL].pool_block_bytes == resolved.hardware[POOL].block_bytes
    assert resolved.below[POOL].block_bytes == resolved.hardware[POOL].block_bytes * share


def test_below_a_pool_are_its_chips_host_and_storage() -> None:
    config = replace(cluster(replace(RUBIN, chips=2)), store=StoreConfig(cpu_bytes=10**12, cmx="file:///any"))
    resolved = resolve(config, CATALOG)
    hardware, size = resolved.hardware[POOL], resolved.hardware[POOL].block_bytes
    host, storage = CATALOG.chip("vr200", 1).host, CATALOG.chip("vr200", 1).storage
    assert host is not None
    assert storage is not None
    # two nodes of two chips share a host of four
    below = Below(2, 2 * host.rate, host.latency_s, 4 * storage.rate, storage.latency_s, size, size)
    assert resolved.below == {POOL: below}
    assert {"vera.efficiency", "cmx.bytes_per_s"} <= set(hardware.assumptions)
    without = resolve(cluster(replace(RUBIN, chips=2)), CATALOG)
    assert without.below == {}
    assert not {name for name in without.hardware[POOL].assumptions if name.startswith(("vera.", "cmx."))}


def test_where_a_chip_has_no_storage_the_cluster_file_says_how_fast_it_is() -> None:
    store = StoreConfig(cpu_bytes=10**10, cmx="s3://bucket/any", cmx_bytes_per_s=5e9, cmx_latency_s=0.25)
    h200 = HardwareConfig(chip="h200", chips=8, host_chips=8)
    below = resolve(replace(cluster(h200, "qwen3-235b-a22b"), store=store), CATALOG).below[POOL]
    assert (below.host_nodes, below.cmx_bytes_per_s, below.cmx_latency_s) == (1, 5e9, 0.25)


def test_a_host_has_no_more_memory_than_its_chips_bring() -> None:
    config = replace(cluster(RUBIN), store=StoreConfig(cpu_bytes=4 * 10**12))
    with pytest.raises(ConfigError, match=r"store.cpu_bytes: a host of 4 vr200 has 3000000000000, is 4000000000000"):
        resolve(config, CATALOG)


def test_below_a_pool_without_hardware_is_what_the_cluster_file_says_beside_blocks_of_a_known_size() -> None:
    store = StoreConfig(cpu_bytes_per_s=3e9, cmx_bytes_per_s=2e9, cmx_latency_s=0.25)
    config = replace(cluster(HardwareConfig()), store=store)
    pool = replace(config.pools[0], profile=CostProfile(fetch_latency_s=0.125))
    resolved = resolve(replace(config, pools=(pool,)), CATALOG, {POOL: BlockBytes(64, 32)})
    assert resolved.below == {POOL: Below(None, 3e9, 0.125, 2e9, 0.25, 32, 64)}


@pytest.mark.parametrize(
    ("cmx", "stored", "device", "direct"),
    [
        ("file:///kv", KvFormat.PLAIN, "auto", True),
        ("file:///kv", KvFormat.FP8, "auto", False),
        ("file:///kv", KvFormat.PLAIN, "cuda", False),
        ("s3://kv", KvFormat.PLAIN, "auto", False),
        ("", KvFormat.PLAIN, "auto", False),
    ],
)
def test_nodes_read_a_folder_by_themselves_into_memory_of_their_host(
    cmx: str, stored: KvFormat, device: str, direct: bool
) -> None:
    config = replace(cluster(HardwareConfig()), store=StoreConfig(cmx=cmx))
    pool = config.pools[0]
    pool = replace(pool, engine=replace(pool.engine, kv_format_stored=stored, device=device))
    resolved = resolve(replace(config, pools=(pool,)), CATALOG, {POOL: BlockBytes(64, 32)})
    assert resolved.below[POOL].direct == direct


def test_a_store_beside_a_pool_of_which_nothing_is_known_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match=r"store: cannot be planned beside pools\[0\], which has no hardware"):
        resolve(replace(cluster(HardwareConfig()), store=StoreConfig()), CATALOG)


def test_blocks_fill_what_weights_and_reserve_leave() -> None:
    resolved = resolve(cluster(RUBIN), CATALOG)
    shape = CATALOG.shape("kimi-k2")
    experts = 60 * 384 * shape.expert_parameters / 8
    copied = 61 * shape.attention_parameters + shape.dense_parameters + 60 * shape.shared_parameters
    weights = (experts + copied) * 0.5625 + 2 * shape.head_parameters * 2
    free = 288e9 * 0.9 - weights - 3.9e9
    assert resolved.hardware[POOL].block_bytes == 64 * 61 * 576
    assert resolved.config.pools[0].engine.blocks == int(free / (64 * 61 * 576))


def test_own_blocks_and_context_limit_are_kept_and_checked() -> None:
    engine = resolve(cluster(RUBIN, blocks=5000, context_tokens_max=1000), CATALOG).config.pools[0].engine
    assert (engine.blocks, engine.context_tokens_max) == (5000, 1000)
    with pytest.raises(ConfigError, match=r"^pools\[0\]\.engine\.blocks: at most \d+ fit"):
        resolve(cluster(RUBIN, blocks=10**7), CATALOG)
    with pytest.raises(
        ConfigError, match=r"^pools\[0\]\.engine\.context_tokens_max: must be at most the model's 262144, is 300000"
    ):
        resolve(cluster(RUBIN, context_tokens_max=300_000), CATALOG)


def test_a_node_pays_for_its_share_of_the_other_half() -> None:
    node = resolve(cluster(WITH_LPX), CATALOG).hardware[POOL]
    gpu, lpu = CATALOG.chip("vr200"), CATALOG.chip("lp30")
    assert node.chips == {"vr200": 1.0, "lp30": 288.0}
    assert node.gpus == 1.0
    assert node.usd_per_hour == pytest.approx(gpu.usd_per_hour + 288 * lpu.usd_per_hour)
    assert node.kw == pytest.approx(gpu.kw + 288 * lpu.kw)


def test_whole_decode_runs_on_the_other_chips_alone() -> None:
    node = resolve(cluster(replace(WITH_LPX, mode=DecodeMode.WHOLE, ffn_chips=4096)), CATALOG).hardware[POOL]
    assert (node.chips, node.gpus) == ({"lp30": 512.0}, 0.0)


def test_experts_moved_away_leave_room_for_context() -> None:
    def blocks(hardware: HardwareConfig) -> int:
        return resolve(cluster(hardware), CATALOG).config.pools[0].engine.blocks

    assert blocks(WITH_LPX) > blocks(RUBIN) > blocks(replace(RUBIN, group_nodes=4))


def test_assumptions_are_those_of_the_chips_and_the_mode() -> None:
    def names(hardware: HardwareConfig) -> set[str]:
        return set(resolve(cluster(hardware), CATALOG).hardware[POOL].assumptions)

    assert names(RUBIN) >= {"vr200.kw", "rubin.nvfp4_expert_efficiency", "nvlink6.exchange_time"}
    assert "rubin.expert_efficiency" not in names(RUBIN)
    assert "lp30.tdp_w" not in names(RUBIN)
    assert names(WITH_LPX) >= {"lp30.tdp_w", "lpx.link_latency_s"}
    assert "lpx.draft_layers" in names(replace(WITH_LPX, mode=DecodeMode.DRAFTER)) - names(WITH_LPX)
    # Experts on LPX, all of decode there: what the GPUs' part would be is not asked.
    assert "rubin.nvfp4_expert_efficiency" not in names(WITH_LPX)
    whole = names(replace(WITH_LPX, mode=DecodeMode.WHOLE, ffn_chips=4096))
    assert not any(name.startswith(("rubin.", "vr200.")) for name in some(whole))
    assert "lp30.domain_chips" not in whole


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        (replace(RUBIN, draft_tokens=2), "practice.acceptance"),
        (replace(WITH_LPX, mode=DecodeMode.DRAFTER, draft_tokens=2), "lpx.acceptance"),
    ],
)
def test_the_chance_that_a_draft_is_accepted_is_an_assumption_of_pools_that_draft(hardware: HardwareConfig, name: str) -> None:
    def tokens_per_pass(hardware: HardwareConfig, catalog: Catalog) -> float:
        return resolve(cluster(hardware), catalog).config.pools[0].profile.tokens_per_pass

    def assumed(hardware: HardwareConfig) -> list[str]:
        names = resolve(cluster(hardware), CATALOG).hardware[POOL].assumptions
        return [name for name in names if name.endswith(".acceptance")]

    assert assumed(hardware) == [name]
    assert tokens_per_pass(hardware, Catalog.load({name: 0.5})) == 1.75
    assert tokens_per_pass(hardware, CATALOG) != 1.75
    # A pool's own number counts, and a resolved pool still has none of its own.
    assert tokens_per_pass(replace(hardware, acceptance=0.5), CATALOG) == 1.75
    assert assumed(replace(hardware, acceptance=0.5)) == assumed(replace(hardware, draft_tokens=0)) == []
    assert resolve(cluster(hardware), CATALOG).config.pools[0].hardware.acceptance is None
    with pytest.raises(ConfigError, match=r"^pools\[0\]\.hardware\.acceptance: must be in \[0, 1\), is 1\.0"):
        tokens_per_pass(hardware, Catalog.load({name: 1.0}))


@pytest.mark.parametrize(
    ("shape", "hardware", "prompt_tokens", "published", "high"),
    [
        # SGLang: DeepSeek-V3's prompts on eight GB200, tokens/s a GPU.
        ("deepseek-v3", HardwareConfig(chip="gb200", group_nodes=8, kv=Precision.BF16), 2000, 18_471, 1.03),
        ("deepseek-v3", replace(RUBIN, chip="gb200"), 2000, 26_156, 1.03),
        # TensorRT-LLM: prompts of a 70B dense model beside their 128 tokens of output each; without those it takes more.
        ("llama-3.1-70b", HardwareConfig(chip="h200"), 2048, 7_072, 1.2),
        ("llama-3.1-70b", replace(RUBIN, chip="gb200", group_nodes=1), 2048, 23_200, 1.2),
    ],
)
def test_prompts_take_what_the_efficiencies_were_fitted_to(
    shape: str, hardware: HardwareConfig, prompt_tokens: int, published: float, high: float
) -> None:
    config = cluster(hardware, shape)
    pool = replace(config.pools[0], scheduler=SchedulerConfig(step_tokens_max=16384))
    profile = resolve(replace(config, pools=(pool,)), CATALOG).config.pools[0].profile
    prompts = 16384 // prompt_tokens
    rate = prompts * prompt_tokens / step_seconds(profile, [(prompt_tokens, 0)] * prompts, 0, 0)
    assert 0.97 <= rate / published <= high


@pytest.mark.parametrize(
    ("hardware", "problem"),
    [
        (
            replace(RUBIN, group_nodes=1),
            r"hardware\.group_nodes: kimi-k2 leaves no room for KV on vr200: .* GB too much .* 3 group",
        ),
        (replace(WITH_LPX, ffn_chips=256), r"hardware\.ffn_chips: 256 lp30 hold .* GB of kimi-k2's .* GB; \d+ would"),
        (replace(RUBIN, chip="h200"), r"hardware\.weights: h200 does not compute in nvfp4; it does in fp8, bf16"),
        (replace(WITH_LPX, ffn_weights=Precision.NVFP4), r"hardware\.ffn_weights: lp30 does not compute in nvfp4"),
        (replace(RUBIN, chip="b100"), r"hardware\.chip: b100: no such chip; there are: gb200"),
    ],
)
def test_impossible_hardware_is_answered_with_its_field(hardware: HardwareConfig, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pools\[0\]\.{problem}"):
        resolve(cluster(hardware), CATALOG)


def test_the_advice_given_fits() -> None:
    assert resolve(cluster(replace(RUBIN, group_nodes=3)), CATALOG).config.pools[0].engine.blocks > 0


def test_a_model_without_shape_is_asked_for_one() -> None:
    with pytest.raises(ConfigError, match=r"^pools\[0\]\.model: models\.default needs a shape"):
        resolve(cluster(RUBIN, shape=""), CATALOG)
    assert machine_of(cluster(RUBIN), cluster(RUBIN).pools[0], CATALOG).shape.name == "kimi-k2"


def test_a_beat_shorter_than_a_pass_of_one_sequence_is_refused() -> None:
    path = FOLDER / "sim" / "vr-nvl72-lpx-cadence.toml"
    config = read_cluster(path)
    hasty = replace(config.pools[2], profile=replace(config.pools[2].profile, beat_s=1e-3))
    with pytest.raises(ConfigError, match=r"pools\[2\]\.profile\.beat_s: must be at least 0\.\d+ s"):
        resolve(replace(config, pools=(*config.pools[:2], hasty)), CATALOG)
    assert resolve(config, CATALOG).config.pools[2].profile.beat_s == config.pools[2].profile.beat_s


def test_hardware_does_not_say_what_a_draft_model_takes() -> None:
    speculation = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_model="small")
    config = cluster(RUBIN, speculation=speculation)
    with pytest.raises(ConfigError, match=r"^pools\[0\]\.profile\.draft_step_s: must be over 0"):
        resolve(config, CATALOG)
    [pool] = config.pools
    given = replace(config, pools=(replace(pool, profile=CostProfile(draft_step_s=0.001)),))
    assert resolve(given, CATALOG).config.pools[0].profile.draft_step_s == 0.001
