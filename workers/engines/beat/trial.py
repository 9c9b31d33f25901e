"""The longest step that a node which keeps a beat can be asked for: every slot taken, every context as long as allowed.

Tokens pick experts as they like. Tried are picks that ask for most: each expert as often as any other, which is most work, and
those of one FFN rank alone, which is most for any rank. FFN ranks answer one message after the other, and a group's other
nodes may each have a step's rows before ours: what FFN ranks compute in a step counts once for every node of the group.
"""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.core.commands import Slice
from orchestrator.core.config import MICROBATCHES_MAX
from orchestrator.core.cost.overlap import choose_microbatches
from orchestrator.core.types import BlockId, RequestId, Sampling
from workers.engines.base import Engine, SplitPlaces
from workers.engines.eager import EagerEngine
from workers.engines.shape import read_architecture
from workers.engines.split.ffn import HalvesTimes
from workers.engines.split.places import first_placements

#: The first steps find nothing in caches, and kernels that are compiled when they are first used.
WARM_STEPS = 4
STEPS, ROUNDS = 5, 8
#: Rounds in which numbers of micro-batches are compared.
COMPARED_ROUNDS = 2
#: What costs most to sample with, and the top log probabilities that clients may ask for.
DEAREST = Sampling(
    temperature=1.0,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    seed=0,
    logprobs=20,
    repetition_penalty=1.1,
    allowed_token_ids=(0,),
)


def longest_step_s(
    engine: EagerEngine, slots: int, model_dir: Path, places: SplitPlaces | None, clock: Callable[[], float]
) -> float:
    """Return the seconds of the longest step that an idle engine can be asked for.

    One that has FFN ranks cuts its steps from then on into as many micro-batches as are asked for, or as make that step shortest.
    """
    routings = dearest_routings(model_dir, len(places.addresses) if places is not None else 1)
    if places is None or engine.split is None:
        return max(_routed_s(engine, slots, experts, clock, ROUNDS) for experts in routings)
    others = places.attention - 1

    def cut_s(count: int, rounds: int) -> float:
        engine.cut(slots, count)
        return max(_shared_s(engine, slots, experts, others, clock, rounds) for experts in routings)

    count = min(places.microbatches, slots)
    count = count or choose_microbatches(lambda tried: cut_s(tried, COMPARED_ROUNDS), min(MICROBATCHES_MAX, slots))
    worst_s = cut_s(count, ROUNDS)
    engine.split.times = HalvesTimes()
    return worst_s


def dearest_routings(model_dir: Path, ranks: int) -> list[Sequence[int]]:
    """Return which experts are to be picked in turn for the longest steps: all; and those of the FFN rank that has most."""
    shape = read_architecture(model_dir)
    if shape.experts is None:
        return [()]
    everything = range(shape.experts.count)
    placement = next(iter(first_placements(shape, ranks, 0).values()))
    return [everything] if ranks == 1 else [everything, max(placement, key=len)]


def _routed_s(engine: EagerEngine, slots: int, experts: Sequence[int], clock: Callable[[], float], rounds: int) -> float:
    with engine.routed(experts):
        return worst_step_s(engine, slots, clock, rounds)


def _shared_s(
    engine: EagerEngine, slots: int, experts: Sequence[int], others: int, clock: Callable[[], float], rounds: int
) -> float:
    """Return the longest step's seconds where FFN ranks compute one for each of so many other nodes as well."""
    assert engine.split is not None, "no FFN ranks"
    engine.split.times = times = HalvesTimes()
    worst_s = _routed_s(engine, slots, experts, clock, rounds)
    return worst_s + others * times.ffn_s / (WARM_STEPS + STEPS * rounds)


def worst_step_s(engine: Engine, slots: int, clock: Callable[[], float], rounds: int = ROUNDS) -> float:
    """Return the seconds of the longest step of an idle engine that decodes one token in each of so many slots.

    It is the longest of the best of a few rounds: what another program took of one of them is not the engine's. Blocks are shared
    between slots where there are too few, as prompts with a common beginning do, and hold nothing afterwards.
    """
    known = engine.description
    context, blocks = known.context_tokens_max, known.blocks
    size = -(-context // known.block_tokens)
    requests = [RequestId(number) for number in range(slots)]
    for request in requests:
        engine.add(request, array("I", bytes(4 * context)), DEAREST)
    tables = [tuple(BlockId((size * number + place) % blocks) for place in range(size)) for number in range(slots)]
    steps = [Slice(request, context - 1, 1, 0, table, True) for request, table in zip(requests, tables, strict=True)]

    def step_s() -> float:
        began = clock()
        failures = [output.failure for output in engine.step(steps) if output.failure is not None]
        assert not failures, failures
        return clock() - began

    for _ in range(WARM_STEPS):
        step_s()
    worst = min(max(step_s() for _ in range(STEPS)) for _ in range(rounds))
    for request in requests:
        engine.forget(request)
    return worst
