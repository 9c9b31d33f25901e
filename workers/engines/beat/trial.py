"""The longest step that a node which keeps a beat can be asked for: every slot taken, every context as long as allowed."""

from array import array
from collections.abc import Callable

from orchestrator.core.commands import Slice
from orchestrator.core.types import BlockId, RequestId, Sampling
from workers.engines.base import Engine

#: The first steps find nothing in caches, and kernels that are compiled when they are first used.
WARM_STEPS = 4
STEPS, ROUNDS = 5, 8
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


def worst_step_s(engine: Engine, slots: int, clock: Callable[[], float]) -> float:
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
    worst = min(max(step_s() for _ in range(STEPS)) for _ in range(ROUNDS))
    for request in requests:
        engine.forget(request)
    return worst
