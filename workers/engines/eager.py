"""The engine that computes: PyTorch on a CPU or a CUDA device, from a Hugging Face checkpoint.

See also `models.py` (the networks), `batch.py` (how a step is laid out), `kvpool.py` (the memory), `sampler.py`.
"""

import os
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.core.commands import Slice
from orchestrator.core.config import MICROBATCHES_MAX, ConfigError, EngineConfig, ModelConfig
from orchestrator.core.types import RequestId, Sampling, SplitLoad
from orchestrator.profiles.model_config import Architecture
from orchestrator.profiles.positions import limited
from orchestrator.wire.trust import Trust
from workers.engines.adapters import Adapters
from workers.engines.attention import decode_way
from workers.engines.base import EngineDescription, ExpertRouting, PromptScores, SliceOutput, SplitPlaces
from workers.engines.batch import BatchBuilder, StepBatch
from workers.engines.checkpoint import fingerprint
from workers.engines.device import device_of, dtype_of
from workers.engines.drafter import Asked, Drafted, Drafter, Drafts, WindowsWanted
from workers.engines.drafts.asking import PoolDrafter
from workers.engines.grammars import Grammars, Masks
from workers.engines.kvpool import KvPool, PooledBlocks
from workers.engines.linear import rows_min
from workers.engines.models import Model
from workers.engines.sampler import sample, score
from workers.engines.sequences import TokenSequence
from workers.engines.shape import read_architecture
from workers.engines.split.ffn import SplitGroup
from workers.engines.split.lanes import LaneLayout, Link, layout_for
from workers.engines.split.microbatches import Microbatches
from workers.engines.split.network import NetworkLink
from workers.engines.split.places import first_placements
from workers.engines.split.shared import SharedLink
from workers.engines.stored import Slab, engine_slab
from workers.engines.weights import Weights

#: Bytes of KV that a CPU engine takes unless told: several nodes share a machine, and host memory is not theirs alone.
CPU_POOL_BYTES_MAX = 2 * 1024**3

#: Of what KV may take, the share of a draft model's.
DRAFTER_SHARE = 0.125

#: Multiply-adds of a step up to which one CPU thread does it. Two gain a quarter on an idle machine; on a busy one each of a
#: step's many small products waits for a thread that the system has put off, which was measured to cost twofold to tenfold.
SINGLE_THREAD_OPERATIONS_MAX = 40_000_000


class EagerEngine(PooledBlocks):
    """One model on one device; see `base.Engine`."""

    def __init__(
        self,
        model_dir: Path,
        config: EngineConfig,
        sequences_max: int,
        step_tokens_max: int,
        allocate: Callable[[int], memoryview] | None = None,
        split: SplitPlaces | None = None,
        rows: int = 0,
        model: ModelConfig | None = None,
        trust: Trust | None = None,
    ) -> None:
        """Load a model and its adapters, and take memory for its KV.

        Args:
            model_dir: a Hugging Face checkpoint directory.
            config: device, dtype, block size and count, threads.
            sequences_max: sequences that run together at most; with the context limit it bounds how many blocks are of use.
            step_tokens_max: tokens of one step at most; on CUDA, memory for their activations is left free.
            allocate: returns that many zeroed bytes for a pool in host memory; None: the engine's own.
            split: where the FFN ranks are that compute the layers' second halves; None: this process computes all.
            rows: rows that each step is filled up to, so that all take the same time.
            model: the model's table in the cluster file, for its adapters; None: it has none.
            trust: the cluster's, where a pool drafts for it.

        Raises:
            CheckpointError: for a checkpoint or an adapter that is incomplete or not supported.
            ConfigError: for a device, a context or a memory size that cannot be had.
            RankLost: if an FFN rank cannot be reached.
        """
        shape = read_architecture(model_dir)
        device = self._device = device_of(config.device)
        dtype = dtype_of(config.dtype, shape)
        slab = engine_slab(shape, config)
        context = limited(shape.context_tokens_max, config.context_tokens_max)
        self._threads = config.threads or torch.get_num_threads()
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            weights = Weights(model_dir, config.weights)
            self._rows_min = rows_min(dtype, device, weights.quantised)
            filled = max(rows, self._rows_min)
            rows_max = max(step_tokens_max, filled)
            self.split = _reach(split, shape, dtype, device, rows_max) if split is not None else None
            self._adapters = Adapters(model or ModelConfig(), dtype, device)
            reserve = step_tokens_max * _row_bytes(shape, dtype)
            self._grammars = Grammars(model_dir, shape.vocabulary)
            #: Asks a pool for drafts, if one drafts for it; and whatever drafts.
            self.drafts: PoolDrafter | None = None
            self._drafter: Drafts | None = None
            with ExitStack() as failing:
                if self.split is not None:
                    failing.callback(self.split.close)
                self._model = Model(weights, shape, dtype, device, self.split, self._adapters)
                if config.speculation.draft_model:
                    wanted = _windows_wanted(
                        config, context, sequences_max, lambda: int(DRAFTER_SHARE * kv_bytes(config, device, reserve))
                    )
                    self._drafter = Drafter(
                        wanted, model_dir, shape, config, device, partial(use_threads, self._threads), self._grammars
                    )
                if config.speculation.draft_pool:
                    assert trust is not None, "nothing is known of who may be believed, and drafts are another process's"
                    self._drafter = self.drafts = PoolDrafter(shape.vocabulary, trust)
                failing.pop_all()
            blocks = config.blocks or _blocks(config, slab, device, sequences_max * context, reserve)
            self._pool = KvPool(blocks, slab, device, allocate, config.kv_format_stored)
            way = decode_way(self._pool, dtype, device, self._threads)
        self._batches = BatchBuilder(self._pool, filled, way, device)
        self._sequences: dict[RequestId, TokenSequence] = {}
        self.description = EngineDescription(
            blocks=blocks,
            block_tokens=config.block_tokens,
            block_bytes=self._pool.block_bytes,
            stored_bytes=self._pool.stored_bytes,
            stored_layout=self._pool.stored_layout,
            vocabulary=shape.vocabulary,
            context_tokens_max=context,
            fingerprint=fingerprint(model_dir, config.weights),
            device=str(device),
            computes=True,
        )

    @property
    def routing(self) -> ExpertRouting | None:
        return self.split

    @property
    def halves(self) -> SplitLoad | None:
        return self.split.load if self.split is not None else None

    @property
    def beats(self) -> None:
        return None

    def cut(self, rows: int, microbatches: int) -> None:
        """Have steps of up to so many rows cut into so many micro-batches from now on, each filled up to its share of them."""
        assert self.split is not None, "one process computes all, at once"
        self.split.microbatches = Microbatches(microbatches)
        self._batches.rows_min = max(-(-rows // microbatches), self._rows_min)

    def routed(self, experts: Sequence[int]) -> AbstractContextManager[None]:
        """Send rows to these experts in turn, in every layer and until the context ends, whatever is in them."""
        return self._model.routed(experts)

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        """Take a request's prompt; one that cannot be computed fails at its first slice."""
        walk = self._grammars.walk(sampling, len(tokens) - generated)
        known = self.description
        sequence = self._sequences[request] = TokenSequence(tokens, sampling, known.vocabulary, generated, walk)
        if sampling.adapter is not None:
            sequence.adapter = self._adapters.number(sampling.adapter)
            if sequence.adapter is None:
                sequence.failure = f"this node has no adapter {sampling.adapter!r}"

    def forget(self, request: RequestId) -> None:
        self._sequences.pop(request, None)
        if self._drafter is not None:
            self._drafter.forget(request)

    @torch.inference_mode()
    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        """Compute a step; see `base.Engine.step`."""
        pieces = list(slices)
        sequences = [self._sequences[piece.request] for piece in slices]
        outputs = [SliceOutput()] * len(slices)
        numbers: list[int] = []
        for number, (piece, sequence) in enumerate(zip(slices, sequences, strict=True)):
            if sequence.failure is not None:
                outputs[number] = SliceOutput(failure=sequence.failure)
                continue
            if piece.blocks:
                sequence.place(piece.first_block, piece.blocks)
            numbers.append(number)
        if not numbers:
            return outputs
        modelled = self._draft(slices, sequences, numbers)
        for number in numbers:
            if drafted := sequences[number].drafted:
                pieces[number] = replace(pieces[number], count=pieces[number].count + drafted)
        began = time.perf_counter()
        count = self.split.microbatches.choose(len(numbers)) if self.split is not None else 1
        self._compute(pieces, sequences, [numbers[part::count] for part in range(count)], outputs)
        seconds = time.perf_counter() - began
        if self.split is not None:
            self.split.times.step_s += seconds
            self.split.microbatches.measured(len(numbers), count, seconds)
        if self._drafter is not None:
            self._drafter.stepped(seconds)
        for number, drafted in modelled.items():
            outputs[number] = replace(outputs[number], drafting_s=drafted.seconds)
        return outputs

    def _draft(self, slices: Sequence[Slice], sequences: Sequence[TokenSequence], numbers: Sequence[int]) -> dict[int, Drafted]:
        """Draft for the sequences that may have drafts; return what the draft model did, by number of the slice."""
        for number in numbers:
            if slices[number].draft_max:
                sequences[number].draft(slices[number].draft_max)
        if self._drafter is None:
            return {}
        left = [number for number in numbers if slices[number].model_draft_max and not sequences[number].drafted]
        asked = [Asked(slices[number].request, sequences[number], slices[number].model_draft_max) for number in left]
        done = self._drafter.draft(asked) if asked else ()
        return {number: drafted for number, drafted in zip(left, done, strict=True) if drafted is not None}

    def _compute(
        self,
        slices: Sequence[Slice],
        sequences: Sequence[TokenSequence],
        parts: Sequence[list[int]],
        outputs: list[SliceOutput],
    ) -> None:
        """Compute the slices of these numbers, in micro-batches, and fill in what they bring."""
        batches = [self._batches.build(slices, sequences, part) for part in parts]
        use_threads(self._threads, sum(batch.rows for batch in batches) * self._model.row_operations)
        masks = self._grammars.begin([sequences[number] for batch in batches for number in batch.sampled_slices])
        logits = self._model.logits(batches, self._pool)
        if logits is not None:
            self._choose(logits, batches, sequences, masks, outputs)
        elif self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        torch.set_num_threads(self._threads)

    @staticmethod
    def _choose(
        logits: Tensor,
        batches: Sequence[StepBatch],
        sequences: Sequence[TokenSequence],
        masks: Masks | None,
        outputs: list[SliceOutput],
    ) -> None:
        """Fill in the tokens that come next, and what prompts' tokens score."""
        scores = _scores(logits, batches, sequences)
        if scores:
            logits = _sampled(logits, batches)
            for number, found in scores.items():
                outputs[number] = SliceOutput(scores=found)
        sampled = [number for batch in batches for number in batch.sampled_slices]
        chosen = sample(logits, [sequences[number] for number in sampled], masks) if sampled else []
        for number, output in zip(sampled, chosen, strict=True):
            outputs[number] = replace(output, scores=scores[number]) if number in scores else output

    def pause_s(self, slices: Sequence[Slice], decoding: int) -> float:
        """Return 0: the time a step takes is the time it takes."""
        return 0.0

    def close(self) -> None:
        """Let go of weights, pool and sequences."""
        self._sequences.clear()
        self._grammars.close()
        if self.split is not None:
            self.split.close()
        if self._drafter is not None:
            self._drafter.close()
        del self._model, self._batches, self._pool, self._drafter


def _scores(logits: Tensor, batches: Sequence[StepBatch], sequences: Sequence[TokenSequence]) -> dict[int, PromptScores]:
    """Return the log probabilities of prompts' tokens that are wanted, by the number of the slice."""
    scores: dict[int, PromptScores] = {}
    end = 0
    for batch in batches:
        end += batch.sampled
        for run in batch.scored:
            start, end = end, end + run.count
            scores[run.slice_number] = score(logits[start:end], sequences[run.slice_number], run.first)
    return scores


def _sampled(logits: Tensor, batches: Sequence[StepBatch]) -> Tensor:
    """Return the rows that are there for their next token."""
    sizes = [size for batch in batches for size in (batch.sampled, sum(run.count for run in batch.scored))]
    return torch.cat(logits.split(sizes)[::2])


def _reach(places: SplitPlaces, shape: Architecture, dtype: torch.dtype, device: torch.device, rows_max: int) -> SplitGroup:
    """Connect to a group's FFN ranks."""
    layout = layout_for(shape, dtype, MICROBATCHES_MAX, rows_max)
    placements = first_placements(shape, len(places.addresses), places.spare_slots)
    with ExitStack() as failing:
        links: list[Link] = []
        for address in places.addresses:
            links.append(_open_link(address, places, layout, device))
            failing.callback(links[-1].close)
        failing.pop_all()
    return SplitGroup(links, shape, placements, device, Microbatches(places.microbatches), places.attention)


def _open_link(address: str, places: SplitPlaces, layout: LaneLayout, device: torch.device) -> Link:
    if "@" not in address:
        return SharedLink(address, layout, places.silent_s)
    assert places.trust is not None, f"nothing is known of who may be believed, and {address} is on another host"
    return NetworkLink(address, layout, places.silent_s, places.trust, device)


def _row_bytes(shape: Architecture, dtype: torch.dtype) -> int:
    """Return an upper estimate of the bytes of activations that one token of a step needs at a time."""
    experts = shape.experts
    routed = experts.per_token * (experts.intermediate + shape.hidden) if experts is not None else 0
    if shape.latent is None:
        attention = shape.queries_width + 2 * shape.keys_width
    else:
        attention = shape.queries_width + shape.attended_width + shape.latent.query_rank + shape.latent.kv_rank
    widest = 2 * max(shape.intermediate, routed, attention)
    return 4 * (4 * shape.hidden + widest) + dtype.itemsize * shape.vocabulary


def use_threads(threads: int, operations: int) -> None:
    """Have so many multiply-adds computed by one thread if they are few, else by so many threads."""
    torch.set_num_threads(1 if operations <= SINGLE_THREAD_OPERATIONS_MAX else threads)


def _windows_wanted(
    config: EngineConfig, context_tokens_max: int, sequences_max: int, memory: Callable[[], int]
) -> WindowsWanted:
    """Return the draft model that an engine is to have beside its own, and its windows."""
    drafts = config.speculation
    context = min(drafts.draft_context_tokens_max, context_tokens_max)
    sequences = drafts.draft_sequences_max or sequences_max
    return WindowsWanted(Path(drafts.draft_model), context, sequences, memory, "engine.speculation.draft_")


def kv_bytes(config: EngineConfig, device: torch.device, reserve: int) -> int:
    """Return the bytes of free memory that the engine may take for KV."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - reserve
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = int(free * config.memory_fraction)
    return share if device.type == "cuda" else min(share, CPU_POOL_BYTES_MAX)


def _blocks(config: EngineConfig, slab: Slab, device: torch.device, tokens_max: int, reserve: int) -> int:
    """Return how many blocks fit into the share of free memory that the engine may take, at most what it can use."""
    share = kv_bytes(config, device, reserve)
    blocks = min(share // slab.bytes, -(-tokens_max // config.block_tokens))
    if blocks < 1:
        raise ConfigError("engine.memory_fraction", f"leaves {share} bytes for KV, and one block takes {slab.bytes}")
    return blocks
