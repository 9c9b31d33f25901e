"""What harnesses' actions have earned: found of what they are about, kept or brought thanks to them, and what that was worth."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.effects import EFFECTS_MAX, OPEN_MAX
from orchestrator.core.config import StoreConfig
from orchestrator.core.events import Ended
from orchestrator.core.hints import Earned, Verb
from orchestrator.core.types import FinishReason, GatewayId, RequestId, SessionId, StoreCounts, TenantId, Tier
from tests.builders import BLOCK_TOKENS, prompt_hashes
from tests.core.cluster.cluster_builders import (
    PROFILE,
    arrived,
    cluster_config,
    join,
    join_store,
    reported,
    store_reported,
    stored,
)
from tests.core.cluster.test_hints import ask, hint

MakeCluster = Callable[..., Cluster]
S = SessionId("s")
#: A node that has forgotten blocks which had idled for ten seconds.
FULL = {"blocks_evicted": 5, "evicted_idle_s": 10.0}


def serve(
    cluster: Cluster,
    serial: int,
    prompt: str,
    now: float,
    hit: str = "",
    cpu: int = 0,
    session: str | None = "s",
    tenant: str = "t",
) -> None:
    """Let a request be served at `now` of which `hit` was found; of that the last `cpu` blocks were loaded."""
    arrival = arrived(serial, prompt, session=session, tenant=TenantId(tenant))
    cluster.handle(arrival, now)
    computed = arrival.request.prompt_tokens - len(hit) * BLOCK_TOKENS
    ended = Ended(RequestId(serial), FinishReason.STOP, 3, computed, cpu_tokens=cpu * BLOCK_TOKENS)
    cluster.handle(reported("a0", ended=[ended], **FULL), now + 1.0)


def earned(cluster: Cluster, prompt: str = "abc", session: str | None = "s") -> list[Earned]:
    named = SessionId(session) if session is not None else None
    return list(cluster.hints.effects.of(TenantId("t"), named, prompt_hashes(prompt)))


def test_a_pin_has_earned_what_others_would_have_pushed_out(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(reported("a0", stored("abc"), **FULL), 0.5)
    receipt, _ = ask(cluster, hint(session=S, ttl_s=600.0), 1.0)
    assert earned(cluster) == [Earned(Verb.PIN, "m", "0", receipt.lease, 3 * 64)]
    # After five seconds nobody would have pushed it out: it was found, and not thanks to the pin.
    serve(cluster, 1, "abcd", 6.0, "abc")
    (so_far,) = earned(cluster)
    assert (so_far.found_tokens, so_far.earned_tokens, so_far.saved_s) == (12, 0, 0.0)
    # After twenty it would have been gone: computing twelve tokens was saved.
    serve(cluster, 2, "abcd", 27.0, "abc")
    (so_far,) = earned(cluster)
    assert (so_far.found_tokens, so_far.earned_tokens) == (24, 12)
    assert so_far.saved_s == pytest.approx(12 * PROFILE.prefill_token_s)
    assert cluster.hints.effects.sums[Verb.PIN] == replace(so_far, message="", action="", lease=None)


def test_a_lease_that_is_over_earns_nothing_more_and_what_it_did_is_still_told(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(reported("a0", stored("abc"), **FULL), 0.5)
    receipt, _ = ask(cluster, hint(session=S, ttl_s=600.0), 1.0)
    serve(cluster, 1, "abc", 20.0, "ab")
    ask(cluster, hint(Verb.UNPIN, action="1", lease=receipt.lease, model=None, hashes=()), 22.0)
    serve(cluster, 2, "abc", 50.0, "ab")
    pinned, unpinned = earned(cluster)
    assert (pinned.found_tokens, pinned.earned_tokens) == (8, 8)
    assert (unpinned.verb, unpinned.size_bytes, unpinned.earned_tokens) == (Verb.UNPIN, 3 * 64, 0)
    assert not cluster.hints.effects.watches(TenantId("t"))


def test_a_renewed_lease_earns_for_the_action_that_renewed_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(reported("a0", stored("abc"), **FULL), 0.5)
    receipt, _ = ask(cluster, hint(session=S), 1.0)
    ask(cluster, hint(session=S, action="1", lease=receipt.lease), 2.0)
    serve(cluster, 1, "abc", 20.0, "ab")
    assert [one.earned_tokens for one in earned(cluster)] == [0, 8]


def test_what_two_actions_earned_counts_for_the_older_one(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(reported("a0", stored("abcd"), **FULL), 0.5)
    ask(cluster, hint(prompt="ab", session=None, ttl_s=600.0), 1.0)  # as by text: a prompt that sessions share
    ask(cluster, hint(action="1", session=S, ttl_s=600.0), 1.0)
    serve(cluster, 1, "abcd", 20.0, "abcd")
    by_action = {one.action: (one.found_tokens, one.earned_tokens) for one in earned(cluster, "abcd")}
    assert by_action == {"0": (8, 0), "1": (12, 12)}  # a session's own are asked before those of shared prompts


def test_a_word_of_a_tool_earns_once_with_the_next_turn(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    serve(cluster, 1, "abc", 1.0)
    ask(cluster, hint(Verb.TOOL_STARTED, session=S, tool_class="bash"), 3.0)
    serve(cluster, 2, "abcd", 30.0, "abc")
    serve(cluster, 3, "abcd", 90.0, "abc")
    assert [(one.verb, one.found_tokens, one.earned_tokens) for one in earned(cluster)] == [(Verb.TOOL_STARTED, 12, 12)]


def test_a_fork_lets_each_childs_first_turn_show_what_it_found_and_parents_pins_cover_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    serve(cluster, 1, "abc", 1.0)
    ask(cluster, hint(Verb.PIN, session=S, ttl_s=600.0), 3.0)
    ask(cluster, hint(Verb.FORK, action="1", session=S, children=(SessionId("c"), SessionId("d"))), 3.0)
    for serial, child in ((2, "c"), (3, "c"), (4, "d")):
        serve(cluster, serial, "abcx", 20.0 * serial, "abc", session=child)
    pinned, forked = earned(cluster)
    assert (forked.found_tokens, forked.earned_tokens) == (24, 0)
    assert (pinned.found_tokens, pinned.earned_tokens) == (36, 36)


def test_a_prefetch_has_earned_what_the_next_prompt_loads_of_what_it_brought() -> None:
    cluster = Cluster(GatewayId(0), replace(cluster_config(), store=StoreConfig(cmx="file:///cmx", cmx_bytes=1 << 30)))
    join(cluster, "a0", stores=True, host="h0")
    join_store(cluster, "s0", "ab", segments=("abcdef",), cmx=True)
    receipt, _ = ask(cluster, hint(Verb.PREFETCH, prompt="abcdef", session=S, tier=Tier.CPU))
    assert receipt.brought == (2, 6)
    serve(cluster, 1, "abcdefg", 5.0, "abcdef", cpu=6)
    (brought,) = earned(cluster, "abcdef")
    assert (brought.size_bytes, brought.found_tokens, brought.earned_tokens) == (4 * 64, 24, 16)
    # Four blocks would have come from cmx in 10 ms and 40 ms more; computing them takes 160 ms.
    assert brought.saved_s == pytest.approx(0.05)
    serve(cluster, 2, "abcdefg", 50.0, "abcdef", cpu=6)
    assert earned(cluster, "abcdef") == [brought]


def test_a_pin_below_hbm_has_earned_what_the_store_would_have_forgotten() -> None:
    cluster = Cluster(GatewayId(0), replace(cluster_config(), store=StoreConfig()))
    join(cluster, "a0", stores=True, host="h0")
    join_store(cluster, "s0", "abcd")
    ask(cluster, hint(prompt="abcd", session=S, tier=Tier.CPU, ttl_s=600.0))
    forgets = {"counts": StoreCounts(cpu_evicted=9), "evicted_idle_s": 30.0}
    cluster.handle(store_reported("s0", **forgets), 2.0)
    for serial, now in ((1, 20.0), (2, 60.0)):
        serve(cluster, serial, "abcde", now, "abcd", cpu=3)
    (kept,) = earned(cluster)
    assert (kept.found_tokens, kept.earned_tokens) == (32, 12)  # what was in hbm as well is not the lease's
    assert kept.saved_s == pytest.approx(0.12 - 0.004)  # computing twelve tokens, less loading three blocks


def test_other_tenants_see_and_earn_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(reported("a0", stored("abc"), **FULL), 0.5)
    ask(cluster, hint(session=S, ttl_s=600.0))
    assert not cluster.hints.effects.watches(TenantId("u"))
    serve(cluster, 1, "abc", 20.0, "ab", tenant="u")
    assert cluster.hints.effects.of(TenantId("u"), S, prompt_hashes("abc")) == ()
    assert [one.found_tokens for one in earned(cluster)] == [0]


def test_actions_that_are_not_done_have_no_effects(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    ask(cluster, hint(prompt=""))
    ask(cluster, hint(action="1", ttl_s=600.0))
    ask(cluster, hint(action="1", ttl_s=600.0))
    assert [one.action for one in earned(cluster)] == ["1"]


def test_what_is_remembered_is_bounded_and_sums_stay(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    serve(cluster, 1, "abc", 0.5)
    for number in range(EFFECTS_MAX + 10):
        ask(cluster, hint(Verb.TOOL_FINISHED, session=S, message=f"{number}"))
    cluster.hints.validate()
    assert len(earned(cluster)) == EFFECTS_MAX
    serve(cluster, 2, "abc", 20.0, "ab")
    assert sum(one.found_tokens for one in earned(cluster)) == OPEN_MAX * 8
    assert cluster.hints.effects.sums[Verb.TOOL_FINISHED].found_tokens == OPEN_MAX * 8
