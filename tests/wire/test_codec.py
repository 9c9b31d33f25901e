"""Every noun survives the wire, and what means nothing is refused."""

import os
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.events import (
    BlocksRetained,
    BlocksRetired,
    Ended,
    FirstToken,
    LeaseEnded,
    LeasesTold,
    NodeReported,
    PrefetchEnded,
)
from orchestrator.core.experts import ExpertBalance
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.types import (
    AdapterName,
    Assignment,
    BlockHash,
    CostProfile,
    FinishReason,
    GatewayId,
    KvBatch,
    Lease,
    LeaseId,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PooledDrafts,
    PoolKind,
    PoolName,
    Prefetch,
    PrefetchEnd,
    RequestId,
    Role,
    Sampling,
    SessionId,
    SplitLoad,
    StoredRun,
    TenantId,
    TenantLoad,
    ThoughtsLimit,
    Tier,
    prefetch_id,
)
from orchestrator.wire import codec, node_pb2

NODE = NodeId("decode-0")
REQUEST = RequestId(3 << 40 | 7)
PREFETCH = prefetch_id(GatewayId(3), 7)


def hashes(count: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(os.urandom(16)) for _ in range(count))


def _sent(sampling: Sampling) -> node_pb2.Sampling:
    message = node_pb2.Sampling()
    codec.write_sampling(message, sampling)
    return node_pb2.Sampling.FromString(message.SerializeToString())


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("source", [None, NodeId("prefill-0")])
@pytest.mark.parametrize("generated", [0, 129])
def test_assignment_survives(role: Role, source: NodeId | None, generated: int) -> None:
    assignment = Assignment(
        request=REQUEST,
        role=role,
        prompt_tokens=130 - generated,
        hashes=hashes(2),
        output_tokens_max=17,
        source=source,
        source_tokens=128 if source else 0,
        source_pending=source is not None,
        source_incarnation=1_795_815_557_914 if source else None,
        priority=-3,
        tenant=TenantId("team"),
        share=2.5,
        stored_tokens=64,
        generated_tokens=generated,
    )
    root = hashes(1)[0]
    sampling = Sampling(temperature=0.5, seed=0, stop_token_ids=(1, 2), logit_bias={5: -1.0})
    message = node_pb2.Submit()
    codec.write_submit(message, codec.Submission(assignment, bytes(130 * 4), root, sampling, 7))
    parsed = node_pb2.Submit.FromString(message.SerializeToString())
    assert codec.assignment_from(parsed) == assignment
    assert parsed.hash_root == root
    assert codec.sampling_from(parsed.sampling) == replace(sampling, seed=7)


@pytest.mark.parametrize("limit", [None, ThoughtsLimit(0, 7), ThoughtsLimit(512, 7, (0,)), ThoughtsLimit(9, 7, (1, 2, 0), 0)])
def test_a_limit_of_thoughts_goes_with_how_tokens_are_chosen(limit: ThoughtsLimit | None) -> None:
    sampling = Sampling(thoughts=limit)
    parsed = _sent(sampling)
    assert codec.sampling_from(parsed) == sampling


@pytest.mark.parametrize("adapter", [None, AdapterName("sql")])
def test_an_adapter_goes_with_how_tokens_are_chosen(adapter: AdapterName | None) -> None:
    sampling = Sampling(temperature=0.5, adapter=adapter)
    parsed = _sent(sampling)
    assert codec.sampling_from(parsed) == sampling


def test_an_assignment_without_a_prompt_is_malformed() -> None:
    submit = node_pb2.Submit(request=REQUEST, role=node_pb2.ROLE_GENERATE, tokens=bytes(8), generated_tokens=2)
    with pytest.raises(codec.MalformedMessage, match="2 tokens and none of a prompt"):
        codec.assignment_from(submit)


@pytest.mark.parametrize("kind", list(PoolKind))
def test_spec_survives(kind: PoolKind) -> None:
    spec = NodeSpec(
        id=NODE,
        model=ModelName("m"),
        pool=PoolName("decode"),
        kind=kind,
        incarnation=4,
        blocks=100,
        block_tokens=64,
        block_bytes=1 << 20,
        sequences_max=8,
        step_tokens_max=512,
        context_tokens_max=4096,
        profile=CostProfile(0.1, 0.2, 0.3, 0.4, 0.5, 6.0, 0.7, draft_step_s=0.8),
        address="127.0.0.1:5",
        host="here",
        stores=True,
        leased_blocks_max=50,
    )
    message = codec.welcome_message(spec, "weights", resumed=True)
    parsed = node_pb2.Welcome.FromString(message.SerializeToString())
    assert codec.spec_from(parsed) == spec
    assert (parsed.fingerprint, parsed.resumed) == ("weights", True)


@pytest.mark.parametrize(
    "split",
    [
        None,
        SplitLoad(1.5, 2.5, 0.5),
        SplitLoad(1.5, 2.5, 0.5, ExpertBalance(0, 0.0, 0.0)),
        SplitLoad(experts=ExpertBalance(3, 0.25, 0.75), links_shared=2, links_network=3),
    ],
)
def test_report_survives(split: SplitLoad | None) -> None:
    tenants = (TenantLoad(TenantId("team"), 2, 300), TenantLoad(TenantId("other"), 0, 1 << 40))
    drafts = PooledDrafts(24, 25, 26, 27, 28.5, 29, 30) if split is None else None
    loads = 1, 2, 3, 4, 5, 6, 7, 1.5, 8, 0.25, tenants, 11, 12, 13, 14.5, 15, 16, 17, 18, 0.5, split, 19, 20, 21, 22, 23, drafts
    load = Load(*loads)
    batches = (
        KvBatch(sequence=0, cleared=True, snapshot=9, more=True),
        KvBatch(sequence=0, stored=(StoredRun(None, hashes(1)),), snapshot=9, page=1),
        KvBatch(sequence=1, stored=(StoredRun(None, hashes(3)), StoredRun(hashes(1)[0], hashes(1))), removed=hashes(2)),
    )
    ends = tuple(Ended(REQUEST, reason, 3, 2, "why", 7, 9, 4, 5) for reason in FinishReason)
    first = (FirstToken(REQUEST, 12, 3, 4, 5, 6),)
    frame = node_pb2.NodeFrame(load=codec.load_message(load))
    frame.kv.extend(codec.kv_message(batch) for batch in batches)
    frame.ended.extend(codec.ended_message(end) for end in ends)
    frame.first_tokens.extend(codec.first_token_message(report) for report in first)
    over = tuple(PrefetchEnded(PREFETCH, reason, 3, 9) for reason in PrefetchEnd)
    frame.ended_prefetches.extend(codec.prefetch_ended_message(report) for report in over)
    parsed = node_pb2.NodeFrame.FromString(frame.SerializeToString())
    assert codec.report_from(NODE, parsed) == NodeReported(NODE, load, first, ends, batches, over)


@pytest.mark.parametrize("source", [None, NodeId("prefill-1")])
def test_a_prefetch_survives(source: NodeId | None) -> None:
    wanted = Prefetch(PREFETCH, hashes(3), 12.5, 2)
    if source is not None:
        wanted = replace(wanted, source=source, source_blocks=3, source_incarnation=0)
    assert codec.prefetch_from(node_pb2.Prefetch.FromString(codec.prefetch_message(wanted).SerializeToString())) == wanted


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"hashes": b""}, "a prefetch of 2 blocks with 0 hashes"),
        ({"stored_blocks": 4}, "a prefetch of 4 blocks with 3 hashes"),
        ({"source_blocks": 1 << 31}, "a prefetch of 2147483648 blocks with 3 hashes"),
        ({"id": REQUEST}, "is no prefetch's number"),
        ({"keep_s": float("nan")}, "not for nan s"),
        ({"keep_s": 0.0}, "not for 0.0 s"),
        ({"keep_s": 1e300}, "not for 1e\\+300 s"),
    ],
)
def test_a_prefetch_that_means_nothing_is_refused(wrong: dict[str, Any], problem: str) -> None:
    message = codec.prefetch_message(Prefetch(PREFETCH, hashes(3), 12.5, 2))
    for name, value in wrong.items():
        setattr(message, name, value)
    with pytest.raises(codec.MalformedMessage, match=problem):
        codec.prefetch_from(message)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (node_pb2.PrefetchEnded(reason="why"), "for the reason 'why'"),
        (node_pb2.PrefetchEnded(reason="used", first_block=2, end_block=1), "a prefetch of blocks 2 to 1"),
    ],
)
def test_an_end_of_a_prefetch_that_means_nothing_is_refused(message: node_pb2.PrefetchEnded, problem: str) -> None:
    with pytest.raises(codec.MalformedMessage, match=problem):
        codec.prefetch_ended_from(message)


LEASE = Lease(LeaseId("l"), TenantId("t"), ModelName("m"), hashes(3), Tier.CPU, 12.5, 1 << 40, 3, SessionId("s"))


def test_leases_survive() -> None:
    frame = node_pb2.NodeFrame()
    leases = (LEASE, replace(LEASE, session=None, revision=0))
    frame.leases.extend(codec.lease_message(lease) for lease in leases)
    frame.ended_leases.append(codec.ended_lease_message(LeaseEnded(LeaseId("x"), 2)))
    parsed = node_pb2.NodeFrame.FromString(frame.SerializeToString())
    assert codec.leases_from(NODE, parsed) == LeasesTold(NODE, leases, (LeaseEnded(LeaseId("x"), 2),))


@pytest.mark.parametrize("at_once", [True, False])
def test_dead_blocks_survive(at_once: bool) -> None:
    retired = BlocksRetired(hashes(3), 1, at_once)
    assert codec.advice_from(node_pb2.Advice.FromString(codec.advice_message(retired).SerializeToString())) == retired


@pytest.mark.parametrize("outlook", [Outlook(ContextId(1 << 63)), Outlook(ContextId(7), (2.0, 30.0), (0.25, 1.0))])
def test_blocks_to_be_retained_survive(outlook: Outlook) -> None:
    retained = BlocksRetained(hashes(3), outlook)
    assert codec.advice_from(node_pb2.Advice.FromString(codec.advice_message(retained).SerializeToString())) == retained


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"tier": "ram"}, "there is no tier 'ram'"),
        ({"ttl_s": float("nan")}, "a lease for nan s"),
        ({"ttl_s": 0.0}, "a lease for 0.0 s"),
        ({"ttl_s": 1e300}, "a lease for 1e\\+300 s"),
        ({"hashes": b""}, "lease l is for nothing"),
        ({"hashes": b"x"}, "1 bytes are no whole number of 16-byte hashes"),
        ({"id": ""}, "id has 0 characters"),
        ({"id": "x" * 999}, "id has 999 characters"),
    ],
)
def test_a_lease_that_means_nothing_is_refused(wrong: dict[str, Any], problem: str) -> None:
    message = codec.lease_message(LEASE)
    for name, value in wrong.items():
        setattr(message, name, value)
    with pytest.raises(codec.MalformedMessage, match=problem):
        codec.lease_from(message)


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(codec.MalformedMessage, match="17 bytes"):
        codec.hashes_from(bytes(17))
    with pytest.raises(codec.MalformedMessage, match="role 0"):
        codec.assignment_from(node_pb2.Submit(request=1, tokens=bytes(4)))
    with pytest.raises(codec.MalformedMessage, match="6 bytes of tokens"):
        codec.assignment_from(node_pb2.Submit(request=1, tokens=bytes(6), role=node_pb2.ROLE_GENERATE))
    with pytest.raises(codec.MalformedMessage, match="0 bytes of tokens"):
        codec.assignment_from(node_pb2.Submit(request=1, role=node_pb2.ROLE_GENERATE))
    for share in (-1.0, 1e-9, 1e9, float("inf"), float("nan")):
        with pytest.raises(codec.MalformedMessage, match="request 1 has a share of"):
            codec.assignment_from(node_pb2.Submit(request=1, tokens=bytes(4), role=node_pb2.ROLE_GENERATE, share=share))
    with pytest.raises(codec.MalformedMessage, match="unknown reason 'tired'"):
        codec.ended_from(node_pb2.Ended(request=1, reason="tired"))
    with pytest.raises(codec.MalformedMessage, match="unknown kind 'x'"):
        codec.spec_from(node_pb2.Welcome(kind="x"))
