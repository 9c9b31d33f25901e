"""What a node does with blocks that a gateway says are dead: they go first, or now, but for what is leased or shared."""

from collections.abc import Callable
from typing import Any

from orchestrator.core.commands import NodeCommand, PublishKv, ReportEnded, RunStep
from orchestrator.core.events import (
    Assigned,
    BlocksRetained,
    BlocksRetired,
    LeasePlaced,
    SliceResult,
    StepFinished,
)
from orchestrator.core.node.node import Node
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.types import KvBatch, Lease, LeaseId, ModelName, TenantId, Tier
from tests.builders import assignment, prompt_hashes

MakeNode = Callable[..., Node]


def lease(prompt: str = "abcd", name: str = "l", **changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "id": LeaseId(name),
        "tenant": TenantId("t"),
        "model": ModelName("m"),
        "hashes": prompt_hashes(prompt),
        "tier": Tier.HBM,
        "ttl_s": 10.0,
        "size_bytes": 64 * len(prompt),
    }
    return Lease(**{**fields, **changes})


def serve(node: Node, request: int, prompt: str, now: float = 0.0) -> list[NodeCommand]:
    """Let a node serve a prompt to its end, with one token of output; return all that it ordered."""
    commands = node.handle(Assigned(assignment(request, prompt, output_tokens_max=1)), now)
    said = list(commands)
    while any(isinstance(command, RunStep) for command in commands):
        (step,) = [command for command in commands if isinstance(command, RunStep)]
        results = tuple(SliceResult(part.request, int(part.sample)) for part in step.slices)
        commands = node.handle(StepFinished(step.step, results, 0.0), now)
        said += commands
    assert any(isinstance(command, ReportEnded) for command in said)
    return said


def cached(node: Node, prompt: str) -> int:
    """Return how many of a prompt's blocks a node has."""
    hashes = prompt_hashes(prompt)
    return node._pool.match(hashes, len(hashes))


def flood(node: Node, first: int = 100, now: float = 0.0) -> None:
    """Fill a node's pool with other prompts twice over."""
    for number in range(8):
        serve(node, first + number, "pqrs"[: 1 + number % 4] + chr(ord("A") + number) * 3, now)


def test_a_dead_chain_goes_before_what_idled_longer(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "wxyz")
    serve(node, 2, "abcd")
    node.handle(BlocksRetired(prompt_hashes("abcd"), 1), 1.0)
    serve(node, 3, "klmnopqr")
    assert (cached(node, "wxyz"), cached(node, "abcd")) == (4, 3)
    serve(node, 4, "AB")
    assert (cached(node, "wxyz"), cached(node, "abcd")) == (4, 1)


def test_a_chain_that_is_expected_stays_before_what_was_used_later(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "abcd")
    serve(node, 2, "wxyz")
    node.handle(BlocksRetained(prompt_hashes("abcd"), Outlook(ContextId(1 << 63), (60.0,), (0.5,))), 1.0)
    serve(node, 3, "klmnopqr", now=2.0)
    assert (cached(node, "abcd"), cached(node, "wxyz")) == (4, 3)
    # Once its time is over it is as any other, and it was used first.
    flood(node, now=70.0)
    assert cached(node, "abcd") == 0


def test_what_is_leased_is_not_retired(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "abcd")
    node.handle(LeasePlaced(lease("abc")), 1.0)
    node.handle(BlocksRetired(prompt_hashes("abcd"), 0), 1.0)
    flood(node)
    assert cached(node, "abcd") == 3


def test_an_evicted_chain_goes_at_once_but_for_what_others_go_on_from(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "abcd")
    serve(node, 2, "abxy")
    said = node.handle(BlocksRetired(prompt_hashes("abcd"), 0, at_once=True), 1.0)
    assert (cached(node, "abcd"), cached(node, "abxy")) == (2, 4)
    assert said == [PublishKv((KvBatch(3, (), prompt_hashes("abcd")[:1:-1]),))]
