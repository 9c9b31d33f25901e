"""Drives an eager engine as a node does, at random: what it writes must not depend on how its work is cut up."""

import random
from array import array
from pathlib import Path

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig, ModelConfig, SpeculationConfig
from orchestrator.core.types import BlockId, RequestId, Sampling
from tests.oracle import Oracle
from workers.engines.base import SplitPlaces, broken_promise
from workers.engines.eager import EagerEngine
from workers.engines.lookup import PromptLookup

BLOCK_TOKENS = 16
#: Of the tests' checkpoints: ordinary tokens are below.
VOCABULARY = 512
GREEDY = Sampling()


def without_ties(generate: Oracle, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and what follows them; at most one in ten is left out."""
    pairs = [(prompt, generate(prompt, count)) for prompt in prompts]
    kept = [(prompt, tokens) for prompt, tokens in pairs if tokens is not None]
    assert len(kept) >= 0.9 * len(prompts)
    return [prompt for prompt, _ in kept], [tokens for _, tokens in kept]


def engine_of(
    path: Path,
    blocks: int = 1024,
    split: SplitPlaces | None = None,
    model: ModelConfig | None = None,
    speculation: SpeculationConfig | None = None,
) -> EagerEngine:
    drafts = speculation or SpeculationConfig()
    config = EngineConfig(device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=blocks, speculation=drafts)
    return EagerEngine(path, config, sequences_max=8, step_tokens_max=2048, split=split, model=model)


class Conductor:
    """Runs several sequences in one engine: random chunk sizes, joins, preemptions and imported prefixes, all from a seed."""

    def __init__(self, engine: EagerEngine, donor: EagerEngine, seed: int) -> None:
        self._engine = engine
        self._donor = donor
        self._random = random.Random(seed)
        #: Drafts up to so many tokens a step, most of them right, when told what is to come out.
        self._drafts: dict[RequestId, list[int]] = {}
        #: Tokens of a draft model that were verified, and that were right.
        self.modelled = self.right = 0
        self._models = False
        self._free = [BlockId(block) for block in range(engine.description.blocks)]
        self._random.shuffle(self._free)

    def run(
        self,
        prompts: list[list[int]],
        count: int,
        together: int,
        guesses: list[list[int]] | None = None,
        samplings: list[Sampling] | None = None,
        models: bool = False,
    ) -> list[list[int]]:
        """Return `count` tokens of each prompt, `together` at a time; drafted are guesses of them, or what a draft model says."""
        self._models = models
        asked = samplings or [GREEDY] * len(prompts)
        self._drafts = {RequestId(number): prompts[number] + guess for number, guess in enumerate(guesses or ())}
        waiting = [_Running(RequestId(number), *one) for number, one in enumerate(zip(prompts, asked, strict=True))]
        everything = list(waiting)
        running: list[_Running] = []
        while waiting or running:
            while waiting and len(running) < together:
                running.append(self._admit(waiting.pop(0)))
            if self._random.random() < 0.05:
                self._preempt(self._random.choice(running))
            self._step(running)
            for done in [each for each in running if len(each.output) >= count]:
                self._free.extend(done.blocks)
                self._engine.forget(done.request)
                running.remove(done)
        return [each.output[:count] for each in everything]

    def _admit(self, new: "_Running") -> "_Running":
        self._engine.add(new.request, array("I", new.tokens), new.sampling)
        if new.request in self._drafts:
            self._engine._sequences[new.request].lookup = Guesses(self._drafts[new.request], self._random)
        if len(new.tokens) > 2 * BLOCK_TOKENS and self._random.random() < 0.5:
            self._import_prefix(new)
        return new

    def _import_prefix(self, new: "_Running") -> None:
        """Let the donor compute a prefix, and copy its blocks over."""
        size = BLOCK_TOKENS
        computed = self._random.randrange(1, len(new.tokens) // size + 1)
        told = tuple(BlockId(block) for block in range(computed))
        self._donor.add(RequestId(0), array("I", new.tokens), new.sampling)
        self._donor.step([Slice(RequestId(0), 0, computed * size, 0, told, False)])
        self._donor.forget(RequestId(0))
        slabs = memoryview(bytearray(computed * self._donor.description.block_bytes))
        self._donor.read_blocks(told, slabs)
        new.blocks = [self._free.pop() for _ in told]
        self._engine.write_blocks(new.blocks, slabs)
        new.computed = min(computed * size, len(new.tokens) - 1)

    def _preempt(self, victim: "_Running") -> None:
        self._free[:0] = victim.blocks
        victim.blocks, victim.computed, victim.told = [], 0, 0

    def _step(self, running: list["_Running"]) -> None:
        slices: list[Slice] = []
        for each in running:
            left = len(each.tokens) - each.computed
            size = min(left, self._random.choice((1, 5, 16, 33, 200, 2048)))
            drafts = self._random.randrange(7) if left == 1 and (self._drafts or self._models) else 0
            end = each.computed + size + drafts
            each.blocks += [self._free.pop() for _ in range(-(-end // BLOCK_TOKENS) - len(each.blocks))]
            told = tuple(each.blocks[each.told :])
            looked_up, modelled = (0, drafts) if self._models else (drafts, 0)
            slices.append(Slice(each.request, each.computed, size, each.told, told, size == left, looked_up, modelled))
            each.told = len(each.blocks)
        for each, part, output in zip(running, slices, self._engine.step(slices), strict=True):
            assert output.failure is None
            assert broken_promise(self._engine, part, output) is None
            each.computed += part.count + max(0, len(output.tokens) - 1)
            if output.drafting_s is not None:
                self.modelled, self.right = self.modelled + output.drafted, self.right + len(output.tokens) - 1
            each.tokens += output.tokens
            each.output += output.tokens


class Guesses(PromptLookup):
    """Drafts what will come out, but for some tokens."""

    def __init__(self, text: list[int], wrong: random.Random) -> None:
        super().__init__()
        self._text, self._wrong = text, wrong

    def find(self, tokens: "array[int]", most: int) -> "array[int]":
        drafts = array("I", self._text[len(tokens) : len(tokens) + most])
        return array("I", [self._wrong.randrange(VOCABULARY) if self._wrong.random() < 0.15 else draft for draft in drafts])


class _Running:
    def __init__(self, request: RequestId, prompt: list[int], sampling: Sampling) -> None:
        self.request = request
        self.sampling = sampling
        self.tokens = list(prompt)
        self.output: list[int] = []
        self.blocks: list[BlockId] = []
        #: Blocks that the engine knows of.
        self.told = 0
        #: Tokens whose KV is in the blocks.
        self.computed = 0


def prompts_of(seed: int, lengths: list[int]) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
