"""Answers that rounding does not decide: an engine writes them all the same where its logits are a little off.

Steps of other rows round otherwise. Of two tokens that are level to the last digits either may come then; so may either of two
on whose edge a drawn number lies. Tests that compare tokens one by one ask for what is further from both.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.core.commands import Slice
from orchestrator.core.types import BlockId, RequestId, Sampling
from workers.engines.eager import EagerEngine

#: Added to each logit at most, up or down, in so many tries: float32 is off by up to 3e-5 against float64 (`oracle.py`).
NOISE, TRIES = 1e-4, 4


@dataclass(frozen=True)
class Decided:
    """What is asked of a model, and what it answers."""

    prompt: tuple[int, ...]
    sampling: Sampling
    tokens: list[int]


def write(engine: EagerEngine, prompt: tuple[int, ...], sampling: Sampling, most: int) -> list[int]:
    """Return what an engine writes that has nothing else to do: up to so many tokens."""
    request, start = RequestId(0), len(prompt)
    engine.add(request, array("I", prompt), sampling)
    blocks = tuple(BlockId(number) for number in range(-(-(start + most) // engine.description.block_tokens)))
    step = Slice(request, 0, start, 0, blocks, True)
    tokens: list[int] = []
    while True:
        [output] = engine.step([step])
        assert output.failure is None, output.failure
        tokens += output.tokens
        if output.stopped or len(tokens) >= most:
            engine.forget(request)
            return tokens
        step = Slice(request, start + len(tokens) - 1, 1, 0, (), True)


def first_decided(
    engine: EagerEngine, asked: Iterable[tuple[tuple[int, ...], Sampling]], wanted: int, most: int
) -> list[Decided]:
    """Return the first `wanted` of what is asked, with their answers, that rounding does not decide; few may be passed over."""
    noise = torch.Generator().manual_seed(1)
    exact = engine._model.logits
    found: list[Decided] = []
    passed = 0
    for prompt, sampling in asked:
        tokens = write(engine, prompt, sampling, most)
        engine._model.logits = _noisy(exact, noise)
        level = any(write(engine, prompt, sampling, most) != tokens for _ in range(TRIES))
        engine._model.logits = exact
        passed += level
        found += [] if level else [Decided(prompt, sampling, tokens)]
        if len(found) == wanted:
            break
    assert len(found) == wanted, f"{len(found)} of {wanted} answers are decided"
    assert passed <= wanted // 3, f"{passed} of {passed + wanted} answers are decided by rounding"
    return found


def _noisy(compute: Callable[..., Any], generator: torch.Generator) -> Callable[..., Any]:
    def logits(*inputs: Any) -> Any:
        found = compute(*inputs)
        return None if found is None else found + NOISE * (2 * torch.rand(found.shape, generator=generator) - 1)

    return logits
