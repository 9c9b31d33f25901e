"""Points of the fronts run through the whole simulator: does a cluster under load give its users what the formulas say?

Users of a decode node ask one thing after another without pause. Their speed is compared with the front's formula at the batches
that were really there at every moment: fewer than there are users, since some wait for their prompts. All prompts are computed by
prefill nodes, as the fronts have it; the router left alone would also have decode nodes compute short ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from orchestrator.cli.fronts import Layout, Point, Workload, point_with, token_seconds_at
from orchestrator.core.config import PoolConfig
from orchestrator.core.types import NodeId, PoolKind
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn

#: Nodes simulated of each kind; the rest of a group steps as these do.
DECODE_NODES, PREFILL_NODES = 2, 8
#: Requests of each user; the first computes its whole context.
TURNS = 4


@dataclass(frozen=True, slots=True)
class Check:
    """One point as the formula has it and as the simulator found it."""

    system: str
    workload: str
    users: int
    #: Sequences that decoded on a node, on average over what the users saw.
    batch: float
    formula_tokens_per_s: float
    simulated_tokens_per_s: float
    #: The simulated point among the front's.
    point: Point

    @property
    def deviation(self) -> float:
        """How far the simulated speed is from the formula's, as a share of it."""
        return self.simulated_tokens_per_s / self.formula_tokens_per_s - 1.0


def check(layout: Layout, workload: Workload, users: int) -> Check:
    """Simulate so many users on every decode node. Every request completes or an assertion fails."""
    turns = list(_turns(workload, users * DECODE_NODES, layout.decode.engine.block_tokens))
    outcome = World(_small(layout), turns, WorldOptions()).run()
    spans: dict[NodeId, list[tuple[float, float]]] = {}
    for one in outcome.served:
        complete = one.completed and one.node and one.first_token_s is not None and one.ended_s is not None
        assert complete, f"request {one.turn.id} of a check: {one.failure or 'never ended'}"
        spans.setdefault(one.node or NodeId(""), []).append((one.first_token_s or 0.0, one.ended_s or 0.0))
    decoding_s = sum(end - first for taken in spans.values() for first, end in taken)
    moments = [moment for taken in spans.values() for moment in _moments(taken)]
    batch = sum(count * count * seconds for count, seconds in moments) / decoding_s
    expected = sum(count * seconds / token_seconds_at(layout, workload, count) for count, seconds in moments)
    itl_s = decoding_s / sum(one.output_tokens - 1 for one in outcome.served)
    point = point_with(layout, workload, batch, itl_s)
    return Check(layout.system.name, workload.name, users, batch, expected / decoding_s, 1 / itl_s, point)


def _moments(spans: Sequence[tuple[float, float]]) -> Iterator[tuple[int, float]]:
    """Yield (sequences that decode, seconds) between any two times at which one starts or ends."""
    changes = sorted([(first, 1) for first, _ in spans] + [(end, -1) for _, end in spans])
    count = 0
    for (at_s, change), (next_s, _) in pairwise(changes):
        count += change
        if count and next_s > at_s:
            yield count, next_s - at_s


def _small(layout: Layout) -> Resolved:
    config = layout.resolved.config
    pools = tuple(_resized(pool) for pool in config.pools)
    router = replace(config.router, disaggregation_tokens_min=1)
    return replace(layout.resolved, config=replace(config, pools=pools, router=router))


def _resized(pool: PoolConfig) -> PoolConfig:
    return replace(pool, nodes=DECODE_NODES if pool.kind is PoolKind.DECODE else PREFILL_NODES)


def _turns(workload: Workload, users: int, block_tokens: int) -> Iterator[TracedTurn]:
    """Yield each user's requests: the same cached context, then new tokens of its own."""
    cached, blocks = workload.cached_tokens // block_tokens, workload.prompt_tokens // block_tokens
    name = 1
    for user in range(users):
        shared = (name, cached)
        name += cached
        for turn in range(TURNS):
            identity = user * TURNS + turn
            yield TracedTurn(
                id=identity,
                session=f"user-{user}",
                agent="main",
                arrival_s=0.0,
                after=(identity - 1,) if turn else (),
                gap_s=0.0,
                input_tokens=workload.prompt_tokens,
                output_tokens=workload.output_tokens,
                block_tokens=block_tokens,
                block_runs=tuple(run for run in (shared, (name, blocks - cached)) if run[1]),
            )
            name += blocks - cached
