"""Where requests go, by every policy, from literal holdings and loads."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.cluster.candidates import Booking, Candidate, Router
from orchestrator.core.cluster.pools import ModelPools
from orchestrator.core.cluster.router import make_router
from orchestrator.core.config import RouterConfig, RouterPolicy
from orchestrator.core.types import (
    BlockHash,
    CostProfile,
    KvBatch,
    NodeId,
    Request,
    RequestId,
    ServiceClass,
    StoredRun,
    TenantId,
    TenantLoad,
)
from tests.builders import BLOCK_TOKENS, prompt_hashes
from tests.core.cluster.cluster_builders import PROFILE, load_of, make_request, spec_of

ANY = list(RouterPolicy)


class Place:
    """The nodes of one model and a router over them."""

    def __init__(self, *nodes: str, profile: CostProfile = PROFILE, **router: Any) -> None:
        self.pools = ModelPools(node_waiting_max=64, share_of=lambda tenant: 1.0)
        self.router: Router = make_router(RouterConfig(**router))
        self.candidates = {name: self.pools.join(spec_of(name, profile=profile)) for name in nodes}
        for name in nodes:
            self.pools.apply(NodeId(name), KvBatch(0, cleared=True))
        self.serial = 100

    def hold(self, name: str, prompt: str) -> None:
        self.pools.apply(NodeId(name), KvBatch(1, (StoredRun(None, prompt_hashes(prompt)),)))

    def load(self, name: str, **load: Any) -> None:
        self.candidates[name].report(load_of(spec_of(name), **load), now=1.0)

    def slow_links(self) -> None:
        """Let a fetch from a peer take longer than any recomputing."""
        for candidate in self.candidates.values():
            candidate.profile = replace(candidate.profile, fetch_bytes_per_s=64.0, fetch_latency_s=1.0)
            candidate.stale = True

    def busy(self, name: str, tokens: int) -> Candidate:
        """Give a node a prompt of another request to compute, 10 ms a token."""
        self.serial += 1
        booking = Booking(tokens, tokens * 0.01, tokens, tokens, given_at=1.0, tenant=TenantId("t"))
        self.candidates[name].give(RequestId(self.serial), booking)
        return self.candidates[name]

    def full(self, asked: Request) -> bool:
        """Return whether there is no room for a request, or none where it must go."""
        options = self.pools.options(asked, (), ())
        return options is None or self.router.place(asked, options) is None

    def place(self, prompt: str = "ab", sticky: str = "", **request: Any) -> tuple[str, str | None, str | None, int]:
        """Return (generating node, prefill node, source, tokens expected not to be computed)."""
        asked: Request = make_request(prompt=prompt, **request)
        options = self.pools.options(asked, (), (NodeId(sticky),) if sticky else ())
        assert options is not None
        placement = self.router.place(asked, options)
        assert placement is not None
        prefill = placement.prefill.spec.id if placement.prefill is not None else None
        return placement.generate.spec.id, prefill, placement.source, placement.cached_tokens


# --- predicted time ---------------------------------------------------------------------------------------------------


def test_equal_nodes_take_turns() -> None:
    place = Place("a0", "a1", "a2")
    assert sorted(place.place()[0] for _ in range(6)) == ["a0", "a0", "a1", "a1", "a2", "a2"]


def test_a_tie_goes_to_the_session_s_node() -> None:
    place = Place("a0", "a1", "a2")
    assert [place.place(sticky="a1")[0] for _ in range(4)] == ["a1"] * 4


def test_a_tie_goes_to_the_node_with_fewest_requests() -> None:
    place = Place("a0", "a1")
    place.busy("a0", tokens=0)
    place.candidates["a0"].computed(RequestId(101))  # it runs there, but costs nothing
    assert [place.place()[0] for _ in range(3)] == ["a1"] * 3


def test_the_longest_prefix_wins_among_idle_nodes() -> None:
    place = Place("a0", "a1", "a2")
    place.hold("a0", "ab")
    place.hold("a2", "abcd")
    assert place.place("abcdef") == ("a2", None, None, 4 * BLOCK_TOKENS)


def test_a_whole_hit_still_computes_the_last_token() -> None:
    place = Place("a0")
    place.hold("a0", "ab")
    assert place.place("ab", tail=0) == ("a0", None, None, 2 * BLOCK_TOKENS - 1)


def test_a_long_wait_outweighs_a_short_prefix() -> None:
    place = Place("a0", "a1", load_factor_max=100.0)
    place.slow_links()
    place.hold("a0", "ab")
    place.busy("a0", tokens=4)  # 40 ms of waiting, 80 ms saved
    assert place.place("abc")[0] == "a0"
    place.busy("a0", tokens=40)
    assert place.place("abc")[0] == "a1"


def test_a_prefix_worth_more_than_its_transfer_is_fetched_from_the_node_that_has_it() -> None:
    place = Place("a0", "a1")
    place.hold("a0", "abcdefgh")
    place.busy("a0", tokens=200)
    # 32 tokens would take 320 ms to compute; 8 blocks arrive in 9 ms
    assert place.place("abcdefgh") == ("a1", None, "a0", 8 * BLOCK_TOKENS)


def test_a_prefix_worth_less_than_its_transfer_is_recomputed() -> None:
    place = Place("a0", "a1")
    place.slow_links()
    place.hold("a0", "ab")
    place.busy("a0", tokens=200)
    assert place.place("ab") == ("a1", None, None, 0)


def test_a_sibling_goes_where_the_first_is_being_computed() -> None:
    place = Place("a0", "a1")
    place.pools.predicted.add(NodeId("a1"), RequestId(7), prompt_hashes("abcdefgh"), 0)
    place.busy("a1", tokens=33)
    assert place.place("abcdefghi") == ("a1", None, None, 8 * BLOCK_TOKENS)


def test_an_overloaded_node_is_passed_over_though_it_answers_sooner() -> None:
    place = Place("a0", "a1", "a2", load_floor_s=0.0, load_factor_max=1.0)
    place.load("a0", running=20)  # twenty sequences decode: 0.2 ms a step and 256 steps to come
    place.load("a1", running=1)
    place.load("a2", running=1)
    for name in ("a1", "a2"):
        place.busy(name, tokens=2)  # 20 ms of waiting there
    assert place.place("a")[0] in ("a1", "a2")
    assert place.candidates["a0"].work_s > place.candidates["a1"].work_s


def test_a_hot_prefix_spreads_once_waiting_for_it_costs_more_than_a_copy() -> None:
    place = Place("a0", "a1", "a2", "a3")
    place.hold("a0", "abcdefgh")
    chosen: list[str] = []
    for _ in range(24):
        node = place.place("abcdefgh", tail=3)[0]
        place.busy(node, tokens=3)
        chosen.append(node)
    counts = [chosen.count(name) for name in ("a0", "a1", "a2", "a3")]
    assert chosen[0] == "a0"
    assert max(counts) <= 2 * 24 / 4  # nobody has more than twice its part


def test_a_node_without_room_for_the_prompt_is_passed_over() -> None:
    place = Place("a0", "a1")
    place.hold("a0", "ab")
    place.load("a0", blocks_free=1)
    assert place.place("abcdef")[0] == "a1"


def test_a_cold_prompt_goes_where_it_pushes_nobody_s_prefix_out() -> None:
    place = Place("a0", "a1")
    place.hold("a0", "ab")
    place.load("a0", blocks_free=0, blocks_cached=1000)
    assert place.place("abcdefgh")[0] == "a1"  # 80 ms saved there, 6 blocks of 40 ms pushed out, every other one missed
    assert place.place("ab")[0] == "a0"  # nothing to push out for what is there already


def test_missed_batches_halve_the_credit() -> None:
    place = Place("a0", "a1")
    place.hold("a0", "abcd")
    place.hold("a1", "abc")
    place.pools.apply(NodeId("a0"), KvBatch(9))  # a gap
    assert place.place("abcd")[0] == "a1"


def test_a_node_s_own_slowness_counts() -> None:
    place = Place("a0", "a1")
    place.load("a0", cost_scale=3.0)
    assert [place.place()[0] for _ in range(3)] == ["a1"] * 3


def test_without_a_profile_hits_are_preferred_and_load_is_spread() -> None:
    place = Place("a0", "a1", profile=CostProfile())
    place.hold("a0", "abcd")
    assert place.place("abcd") == ("a0", None, None, 4 * BLOCK_TOKENS)
    assert sorted(place.place("x")[0] for _ in range(4)) == ["a0", "a0", "a1", "a1"]
    place.busy("a0", tokens=40)
    assert place.place("x")[0] == "a1"


# --- prefill and decode apart -----------------------------------------------------------------------------------------


def test_a_long_cold_prompt_goes_to_the_prefill_pool() -> None:
    place = Place("p0", "d0", "d1")
    generate, prefill, source, cached = place.place("x" * 40)
    assert (generate in ("d0", "d1"), prefill, source, cached) == (True, "p0", None, 0)


def test_a_short_uncached_tail_is_computed_where_it_is_decoded() -> None:
    place = Place("p0", "d0", "d1")
    place.hold("d1", "x" * 40)
    assert place.place("x" * 40, tail=1) == ("d1", None, None, 40 * BLOCK_TOKENS)


def test_running_sequences_push_a_tail_to_the_prefill_pool() -> None:
    place = Place("p0", "d0")
    place.hold("d0", "x" * 40)
    assert place.place("x" * 40, tail=3)[1] is None
    place.load("d0", running=7)
    assert place.place("x" * 40, tail=3) == ("d0", "p0", "d0", 40 * BLOCK_TOKENS)  # and p0 fetches what d0 has


def test_a_busy_prefill_pool_leaves_work_to_idle_decode_nodes() -> None:
    place = Place("p0", "d0")
    place.busy("p0", tokens=1000)
    assert place.place("x" * 40)[:2] == ("d0", None)


def test_the_prefill_node_with_the_longest_prefix_is_taken() -> None:
    place = Place("p0", "p1", "d0", disaggregation_tokens_min=0)
    place.hold("p1", "abcd")
    assert place.place("abcdef") == ("d0", "p1", None, 4 * BLOCK_TOKENS)


@pytest.mark.parametrize(("tail", "prefill"), [(3, None), (4, "p0"), (5, "p0")])
def test_a_threshold_overrides_the_prediction(tail: int, prefill: str | None) -> None:
    place = Place("p0", "d0", disaggregation_tokens_min=4)
    place.hold("d0", "ab")
    hashes = prompt_hashes("abc" if tail >= 4 else "ab")
    assert place.place("ab", tail=tail, hashes=hashes)[1] == prefill


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ANY)
def test_every_policy_spreads_cold_requests_over_idle_nodes(policy: RouterPolicy) -> None:
    place = Place("a0", "a1", "a2", "a3", policy=policy)
    chosen: list[str] = []
    for serial in range(40):
        hashes = (BlockHash(b"own%d" % serial),)
        node = place.place("a", hashes=hashes)[0]
        place.busy(node, tokens=5)
        chosen.append(node)
    if policy is not RouterPolicy.SGLANG:  # which counts what caches hold, and nothing is held here
        assert sorted(place.candidates) == sorted(dict.fromkeys(chosen))


@pytest.mark.parametrize("policy", ANY)
def test_every_policy_uses_the_prefill_pool_for_cold_prompts(policy: RouterPolicy) -> None:
    place = Place("p0", "d0", policy=policy)
    assert place.place("x" * 40)[:2] == ("d0", "p0")


@pytest.mark.parametrize("policy", ANY)
def test_every_policy_repeats_itself_from_its_seed(policy: RouterPolicy) -> None:
    runs: list[list[str]] = []
    for _ in range(2):
        place = Place("a0", "a1", "a2", policy=policy, seed=5)
        runs.append([place.place()[0] for _ in range(20)])
    assert runs[0] == runs[1]


def test_round_robin_takes_turns_whatever_is_cached() -> None:
    place = Place("a0", "a1", policy=RouterPolicy.ROUND_ROBIN)
    place.hold("a0", "ab")
    assert [place.place()[0] for _ in range(4)] == ["a0", "a1", "a0", "a1"]


def test_least_loaded_counts_requests() -> None:
    place = Place("a0", "a1", policy=RouterPolicy.LEAST_LOADED)
    place.busy("a0", tokens=1)
    assert place.place()[0] == "a1"


def test_dynamo_weighs_cached_blocks_against_active_ones() -> None:
    place = Place("a0", "a1", policy=RouterPolicy.DYNAMO)
    place.hold("a0", "abcd")
    assert place.place("abcdef") == ("a0", None, None, 4 * BLOCK_TOKENS)
    # active on a0: 3 blocks to prefill and 3 in use, more than the 4 it would save
    place.busy("a0", tokens=3 * BLOCK_TOKENS)
    assert place.place("abcdef")[0] == "a1"


def test_sglang_takes_the_best_match_if_it_is_good_enough_and_loads_are_even() -> None:
    place = Place("a0", "a1", policy=RouterPolicy.SGLANG)
    place.hold("a0", "abc")
    place.load("a0", blocks_free=900, blocks_cached=100)
    assert place.place("abcdefghij")[0] == "a0"  # 3 of 10 blocks
    assert place.place("abcdefghijk")[0] == "a1"  # 3 of 11: the node whose cache is emptiest
    for _ in range(65):
        place.busy("a0", tokens=0)
    assert place.place("abc")[0] == "a1"  # 65 requests more than the other


def waits(*tenants: tuple[str, int, int]) -> dict[str, Any]:
    """Return a load with so many requests and tokens of each tenant waiting."""
    parts = tuple(TenantLoad(TenantId(name), waiting, tokens) for name, waiting, tokens in tenants)
    return {
        "running": 8,
        "waiting": sum(part.waiting for part in parts),
        "queued_tokens": sum(part.queued_tokens for part in parts),
        "tenants": parts,
    }


def test_a_queue_of_another_tenant_is_no_longer_than_ones_own() -> None:
    place = Place("a0", "a1")
    place.load("a0", **waits(("flood", 50, 50_000)))
    place.load("a1", **waits(("t", 5, 500)))
    assert place.place(tenant=TenantId("t"))[0] == "a0"  # of the flood only as much is before it as of its own
    assert place.place(tenant=TenantId("flood"))[0] == "a1"


def test_a_node_that_is_full_of_others_has_room_for_a_tenants_part() -> None:
    place = Place("a0")
    asked = make_request(tenant=TenantId("t"))
    place.load("a0", **waits(("flood", 64, 6_400)))
    assert not place.full(asked)
    assert place.full(make_request(tenant=TenantId("flood")))
    place.load("a0", **waits(("flood", 64, 6_400), ("t", 31, 3_100)))
    assert not place.full(asked)
    place.load("a0", **waits(("flood", 64, 6_400), ("t", 32, 3_200)))
    assert place.full(asked)  # two tenants, 64 places
    place.load("a0", running=8, waiting=64, queued_tokens=6_400)
    assert place.full(asked)  # whose they are is not said


def test_a_prompt_that_must_go_to_prefill_nodes_waits_while_they_are_full() -> None:
    place = Place("p0", "d0", disaggregation_tokens_min=8)
    place.load("p0", running=8, waiting=64, queued_tokens=6_400)
    assert place.full(make_request(prompt="aaaa"))
    assert not place.full(make_request(prompt="a"))  # short enough for the decode node
    place.load("p0", running=8, waiting=63, queued_tokens=6_300)
    assert place.place("aaaa")[:2] == ("d0", "p0")
    anywhere = Place("p0", "d0")
    anywhere.load("p0", running=8, waiting=64, queued_tokens=6_400)
    assert anywhere.place("aaaa")[:2] == ("d0", None)  # whatever is sooner
    gone = Place("d0", disaggregation_tokens_min=8)
    assert gone.place("aaaa")[:2] == ("d0", None)  # nobody else can


# --- class cadence ----------------------------------------------------------------------------------------------------

#: A pass takes 1 ms for each sequence and 0.1 ms for each token of context; 10 ms are a beat.
BEAT = replace(PROFILE, sequence_s=1e-3, context_token_s=1e-4, beat_s=10e-3)
CADENCE = ServiceClass.CADENCE


def beating(*nodes: str, **router: Any) -> Place:
    """Return a place whose nodes l0, l1, ... keep a beat."""
    place = Place(*(name for name in nodes if name[0] != "l"), **router)
    for name in nodes:
        if name[0] == "l":
            place.candidates[name] = place.pools.join(spec_of(name, profile=BEAT))
            place.pools.apply(NodeId(name), KvBatch(0, cleared=True))
    return place


@pytest.mark.parametrize("policy", ANY)
def test_class_cadence_goes_where_the_beat_is_kept_and_nobody_else_does(policy: RouterPolicy) -> None:
    place = beating("p0", "d0", "l0", policy=policy)
    assert place.place(service_class=CADENCE)[:2] == ("l0", "p0")
    for other in ServiceClass:
        if other is not CADENCE:
            assert place.place(service_class=other)[0] == "d0"


@pytest.mark.parametrize("policy", ANY)
def test_a_prompt_is_never_computed_in_a_beat(policy: RouterPolicy) -> None:
    place = beating("p0", "d0", "l0", policy=policy, disaggregation_tokens_min=1000)
    # All but one token are held there: still another node computes that one.
    place.hold("l0", "ab")
    assert place.place("ab", service_class=CADENCE)[:2] == ("l0", "p0")
    # And where nobody else can compute, it goes where everybody goes.
    without = beating("a0", "l0", policy=policy)
    assert without.place(service_class=CADENCE)[:2] == ("a0", None)


def test_what_its_slots_may_come_to_decides_whether_a_node_takes_one_more() -> None:
    place = beating("p0", "d0", "l0")
    # 9 + 8 tokens: 2.7 ms; two others that may come to 40 together take 6 ms.
    place.load("l0", running=2, context_tokens=40)
    assert place.place(service_class=CADENCE)[0] == "l0"
    place.load("l0", running=2, context_tokens=60)
    assert place.place(service_class=CADENCE)[0] == "d0"
    # What was given to it since its last report counts as well.
    place.load("l0", running=1, context_tokens=20)
    place.candidates["l0"].give(RequestId(7), Booking(0, 0.0, 0, 40, given_at=2.0, tenant=TenantId("t")))
    assert place.place(service_class=CADENCE)[0] == "d0"
    place.candidates["l0"].take(RequestId(7))
    assert place.place(service_class=CADENCE)[0] == "l0"


def test_full_slots_and_full_pools_send_cadence_elsewhere() -> None:
    place = beating("p0", "d0", "l0", "l1")
    place.load("l0", running=8)
    assert place.place(service_class=CADENCE)[0] == "l1"
    assert place.place(service_class=CADENCE, output_tokens_max=5000)[0] == "d0"


def test_a_quicker_beat_than_the_pool_keeps_is_looked_for_elsewhere() -> None:
    place = beating("p0", "d0", "l0")
    assert place.place(service_class=CADENCE, beat_s_max=0.01)[0] == "l0"
    assert place.place(service_class=CADENCE, beat_s_max=0.005)[0] == "d0"


def test_a_session_comes_back_to_the_beat_with_its_context() -> None:
    place = beating("p0", "d0", "l0")
    # The last turn was on a decode node, while the slots were taken: the prefill node fetches what that one holds.
    place.hold("d0", "abcdefgh")
    generate, prefill, source, cached = place.place("abcdefgh", sticky="d0", service_class=CADENCE)
    assert (generate, prefill, source, cached) == ("l0", "p0", "d0", 32)


def test_only_nodes_that_serve_anybody_count_as_serving() -> None:
    place = beating("l0")
    assert not place.pools.generates
    assert place.pools.context_tokens_max == 0
