"""Hosts' stores in the simulated world: what they bring, what goes wrong with them, and that nothing is left over."""

from dataclasses import replace

import pytest

from orchestrator.core.config import ConfigError, ModelConfig, RouterPolicy
from orchestrator.core.types import PoolKind, PoolName
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.faults import Faults
from orchestrator.sim.hints import HintProgram
from orchestrator.sim.outcome import Outcome, StoreUse
from orchestrator.sim.runs import CacheRule, simulate
from orchestrator.sim.stores import store_specs
from orchestrator.sim.world import World, WorldOptions
from tests.builders import some
from tests.sim.worlds import BELOW, agents, below, cluster

TOGETHER = {PoolKind.AGGREGATED: 3}
APART = {PoolKind.PREFILL: 2, PoolKind.DECODE: 2}
#: Blocks of a node: less than the sessions' contexts need.
SHORT = 160


def serve(resolved: Resolved, seed: int = 1, faults: Faults | None = None) -> Outcome:
    """Let agents work whose contexts do not fit the nodes' memory."""
    trace = agents(12, 4, seed, context_tokens=450)
    return World(resolved, trace, WorldOptions(seed=seed, faults=faults)).run()


def used(outcome: Outcome) -> StoreUse:
    assert outcome.stores is not None
    return outcome.stores


@pytest.mark.parametrize("layout", [TOGETHER, APART], ids=["together", "apart"])
def test_what_nodes_forgot_comes_from_the_hosts_memory(layout: dict[PoolKind, int]) -> None:
    without = serve(cluster(layout, blocks=SHORT))
    outcome = serve(cluster(layout, blocks=SHORT, store=below(4000)))
    assert all(served.completed for served in some(outcome.served))
    assert sum(served.cpu_tokens for served in outcome.served) > 0
    assert sum(served.cmx_tokens for served in outcome.served) == 0
    cached = [sum(served.cached_tokens for served in one.served) for one in (without, outcome)]
    assert cached[1] > cached[0]
    assert used(outcome).loaded_bytes > 0
    assert used(outcome).offered_bytes > 0
    assert used(outcome).cmx_written_bytes == 0


@pytest.mark.parametrize("cpu_blocks", [4000, 250], ids=["cpu", "cmx"])
def test_what_agents_have_brought_back_before_their_next_turn_need_not_be_loaded_then(cpu_blocks: int) -> None:
    resolved = cluster(APART, blocks=SHORT, store=below(cpu_blocks, cmx=True))
    trace = agents(12, 4, 1, context_tokens=450)
    runs = [World(resolved, trace, WorldOptions(hints=program)).run() for program in (HintProgram.ORACLE, HintProgram.PREFETCH)]
    for run in runs:
        assert all(served.completed for served in some(run.served))
    loaded = [sum(served.cpu_tokens + served.cmx_tokens for served in run.served) for run in runs]
    assert loaded[1] < loaded[0]
    prefetched, used_blocks = [
        sum(getattr(use, name) for use in runs[1].pools.values()) for name in ("prefetched_blocks", "prefetch_used_blocks")
    ]
    assert prefetched >= used_blocks > 0
    assert sum(use.prefetched_blocks for use in runs[0].pools.values()) == 0


def test_what_the_hosts_memory_forgot_comes_from_the_shared_storage() -> None:
    outcome = serve(cluster(TOGETHER, blocks=SHORT, store=below(250, cmx=True)))
    assert all(served.completed for served in some(outcome.served))
    assert sum(served.cmx_tokens for served in outcome.served) > 0
    assert used(outcome).cmx_written_bytes >= used(outcome).cmx_read_bytes > 0


def test_stores_hold_more_blocks_of_fewer_bytes() -> None:
    whole = cluster(TOGETHER, blocks=SHORT, store=below(150))
    fewer = replace(BELOW, block_bytes=BELOW.block_bytes // 4)
    plain, packed = serve(whole), serve(replace(whole, below={PoolName("aggregated"): fewer}))
    tokens = [sum(served.cpu_tokens for served in one.served) for one in (plain, packed)]
    assert tokens[1] > tokens[0]
    assert used(packed).loaded_bytes < used(plain).loaded_bytes * tokens[1] / tokens[0]


def test_baselines_compute_what_nodes_forgot() -> None:
    outcome = serve(cluster(TOGETHER, blocks=SHORT, policy=RouterPolicy.ROUND_ROBIN, store=below(4000)))
    assert all(served.completed for served in some(outcome.served))
    assert used(outcome).loaded_bytes == 0


def test_figures_tell_hits_by_tier() -> None:
    resolved = cluster(TOGETHER, blocks=SHORT, store=below(250, cmx=True))
    figures = simulate(resolved, agents(12, 4, 1, context_tokens=450), RouterPolicy.PREDICTED_TIME, CacheRule.LRU, 0).figures
    tiers = figures["hit_rate_by_tier"]
    assert sum(tiers.values()) == pytest.approx(figures["hit_rate"])
    assert min(tiers.values()) > 0
    assert figures["stores"]["hosts"] == 2
    assert 0 < figures["stores"]["cpu"]["held"] <= 1


def test_figures_without_stores_have_none() -> None:
    figures = simulate(cluster(TOGETHER), agents(2, 2, 1), RouterPolicy.PREDICTED_TIME, CacheRule.LRU, 0).figures
    assert figures["stores"] is None
    assert figures["hit_rate_by_tier"]["cpu"] == 0


@pytest.mark.parametrize("hints", [HintProgram.NONE, HintProgram.PREFETCH])
def test_with_everything_going_wrong_every_turn_ends_and_nothing_is_left(hints: HintProgram) -> None:
    check_faults(TOGETHER, seed=3, sessions=3, hints=hints)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_with_everything_going_wrong_over_many_seeds(seed: int) -> None:
    hints = (HintProgram.NONE, HintProgram.PREFETCH)[seed // 2 % 2]
    check_faults((TOGETHER, APART)[seed % 2], seed, sessions=8, hints=hints)


def check_faults(layout: dict[PoolKind, int], seed: int, sessions: int, hints: HintProgram, direct: bool = False) -> None:
    faults = Faults(
        until_s=8.0, crashes=2, restart_s=0.5, hangs=1, gateway_hangs=1, store_crashes=3, damaged_share=0.2,
        late_share=0.2, lost_kv_share=0.1, broken_fetch_share=0.1, abandoned_share=0.1, slow_nodes=1,
    )  # fmt: skip
    resolved = cluster(layout, blocks=SHORT, gateways=2, store=below(400, cmx=True))
    resolved = straight(resolved) if direct else resolved
    trace = agents(sessions, 3, seed, context_tokens=600)
    outcome = World(resolved, trace, WorldOptions(seed=seed, checks=True, faults=faults, hints=hints)).run()
    assert all(served.ended_s is not None for served in some(outcome.served))


def test_a_store_that_crashed_comes_back_with_what_is_in_the_shared_storage() -> None:
    resolved = cluster({PoolKind.AGGREGATED: 2}, blocks=SHORT, store=below(1000, cmx=True))
    faults = Faults(until_s=6.0, store_crashes=8, restart_s=0.1)
    outcome = serve(resolved, seed=2, faults=faults)
    assert all(served.completed for served in some(outcome.served))
    assert sum(served.cmx_tokens for served in outcome.served) > 0


def test_equal_seeds_give_equal_runs() -> None:
    faults = Faults(until_s=8.0, store_crashes=2, damaged_share=0.3)
    resolved = cluster(APART, blocks=SHORT, store=below(300, cmx=True))
    trace = agents(5, 3, 1, context_tokens=600)
    digests = [World(resolved, trace, WorldOptions(seed=4, digest=True, faults=faults)).run().digest for _ in range(2)]
    assert digests[0] == digests[1]


def test_a_host_with_too_little_memory_for_a_segment_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"store.cpu_bytes: leaves a host of aggregated no room for a segment of 4 blocks"):
        World(cluster(TOGETHER, store=below(3)), [], WorldOptions())


def test_nodes_of_which_the_profile_alone_is_known_share_one_host_and_models_its_memory() -> None:
    store = replace(below(1000), shares={"small": 0.25})
    config = cluster(APART, blocks=SHORT).config
    pools = (*config.pools, replace(config.pools[0], name="small", kind=PoolKind.AGGREGATED, model="small"))
    config = replace(config, models={"default": ModelConfig(), "small": ModelConfig()}, pools=pools, store=store)
    known = dict.fromkeys((PoolName(pool.name) for pool in pools), replace(BELOW, host_nodes=None))
    (spec,) = store_specs(store, Resolved(config, {}, known))
    assert [(part.model, part.slots) for part in spec.models] == [("default", 800), ("small", 200)]


def straight(resolved: Resolved) -> Resolved:
    """Return the cluster with nodes that read what is in `cmx` alone by themselves."""
    return replace(resolved, below={pool: replace(one, direct=True) for pool, one in resolved.below.items()})


@pytest.mark.parametrize("layout", [TOGETHER, APART], ids=["together", "apart"])
def test_what_nodes_read_by_themselves_does_not_wait_for_their_hosts_memory(layout: dict[PoolKind, int]) -> None:
    # The memory is slower than the storage here: whatever is copied out of it shows.
    slow = replace(BELOW, cpu_bytes_per_s=2e6)
    resolved = cluster(layout, blocks=SHORT, store=below(250, cmx=True))
    resolved = replace(resolved, below=dict.fromkeys(resolved.below, slow))
    through, past = serve(resolved), serve(straight(resolved))
    for outcome in (through, past):
        assert all(served.completed for served in some(outcome.served))
        assert sum(served.cmx_tokens for served in outcome.served) > 0
        assert used(outcome).cmx_read_bytes > 0
    waits = [sum(served.ttft_s or 0.0 for served in one.served) for one in (through, past)]
    assert waits[1] < waits[0]
    brought = [used(one).loaded_bytes for one in (through, past)]
    assert brought[1] > brought[0]


@pytest.mark.parametrize("hints", [HintProgram.NONE, HintProgram.PREFETCH])
def test_with_everything_going_wrong_reads_by_nodes_end_as_well(hints: HintProgram) -> None:
    check_faults(TOGETHER, seed=5, sessions=3, hints=hints, direct=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 124))
def test_with_everything_going_wrong_reads_by_nodes_end_over_many_seeds(seed: int) -> None:
    hints = (HintProgram.NONE, HintProgram.PREFETCH)[seed // 2 % 2]
    check_faults((TOGETHER, APART)[seed % 2], seed, sessions=8, hints=hints, direct=True)
