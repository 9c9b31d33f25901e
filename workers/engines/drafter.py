"""Drafts by a second, smaller model of the same vocabulary, for sequences in which nothing was found to look up.

It drafts for all of them together: a pass brings each its next token, the most likely one, until all have as many as they may
have. Whatever it says is verified, so that it only has to be right often: it sees a window of a sequence's last tokens, counted
from the window's beginning, whose keys and values lie in blocks of its own.

    tokens of the sequence      ..................................................
    the window                                 |--------- read --------|--unread--|    begins anew, half full, when it is full

What is unread is read in pieces, a few sequences at a time, so long as that takes a small share of a step: no step waits for a
prompt. Tokens that turn out otherwise than they were drafted are put right when the sequence is drafted for again; a sequence
that is forgotten gives its blocks back, and one that has not been drafted for in a while loses them to one that is.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from orchestrator.core.commands import Slice
from orchestrator.core.config import DRAFT_CONTEXT_TOKENS_MIN, DRAFT_TOKENS_MAX, ConfigError, EngineConfig
from orchestrator.core.types import RequestId
from orchestrator.profiles.model_config import Architecture
from workers.engines.attention import decode_way
from workers.engines.batch import BatchBuilder, StepBatch
from workers.engines.device import dtype_of
from workers.engines.grammars import Grammars
from workers.engines.kvpool import KvPool
from workers.engines.linear import rows_min
from workers.engines.models import Model
from workers.engines.sequences import TokenSequence
from workers.engines.shape import read_architecture
from workers.engines.stored import engine_slab
from workers.engines.weights import Weights

FIELD = "engine.speculation.draft_model"
#: Unread tokens with which a sequence is drafted for at once: those that the model has not seen since it drafted last.
UNREAD_MAX = 16
#: What reading may take of a step's time, and the tokens of one piece, of all sequences: at first, at least and at most.
READING_SHARE = 0.25
PIECE_TOKENS, PIECE_TOKENS_MIN, PIECE_TOKENS_MAX = 64, 16, 2048
#: Steps with drafts after which a sequence that had none of them has to give its window to another.
IDLE_STEPS = 64


@dataclass(frozen=True, slots=True)
class Asked:
    """A sequence that may have drafts."""

    request: RequestId
    sequence: TokenSequence
    #: Tokens at most.
    most: int


@dataclass(frozen=True, slots=True)
class Drafted:
    """What was done for it: tokens that were added to it as drafts, 0 while its text is being read, and seconds for that."""

    tokens: int
    seconds: float


class Window:
    """What the draft model sees of one sequence; a sequence of a batch by itself (`BatchSequence`)."""

    __slots__ = ("_checked", "computed", "first", "place", "table", "tokens", "used")

    #: It has no adapter, nothing that is verified, and no prompt that is scored.
    adapter: int | None = None
    drafted = 0
    scored = 0
    prompt_tokens = 0

    def __init__(self, place: int, table: NDArray[np.int64]) -> None:
        #: Which of the windows' places in the pool it has.
        self.place = place
        self.table = table
        #: Tokens of the sequence before it.
        self.first = 0
        self.tokens = array("I")
        #: Of its tokens, how many have been read.
        self.computed = 0
        #: And how many of them are known to be the sequence's.
        self._checked = 0
        #: When it was drafted for last.
        self.used = 0

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.computed

    def follow(self, tokens: "array[int]", context: int) -> None:
        """See to it that its tokens are the sequence's last ones, `context` at most; drafts that were wrong go."""
        if not self.tokens or len(tokens) - self.first > context:
            self.first = len(tokens) - context // 2 if len(tokens) > context else 0
            self.tokens, self.computed = tokens[self.first :], 0
        else:
            known, drafts = tokens[self.first + self._checked :], self.tokens[self._checked :]
            right = 0
            while right < min(len(known), len(drafts)) and known[right] == drafts[right]:
                right += 1
            self.tokens[self._checked :] = known
            self.computed = min(self.computed, self._checked + right)
        self._checked = len(self.tokens)
        # The last token is computed once more if need be: what follows it is asked for.
        self.computed = min(self.computed, self._checked - 1)


class Drafter:
    """A draft model, and what it has read of which sequences."""

    def __init__(
        self,
        model_dir: Path,
        shape: Architecture,
        config: EngineConfig,
        device: torch.device,
        sequences_max: int,
        context_tokens_max: int,
        memory: Callable[[], int],
        use_threads: Callable[[int], None],
        grammars: Grammars,
    ) -> None:
        """Load the model that an engine's configuration names, and take memory for its KV.

        Args:
            model_dir: the checkpoint of the model that verifies.
            shape: that model's.
            config: of the engine.
            device: the engine's.
            sequences_max: sequences that run together at most.
            context_tokens_max: longest prompt plus output, tokens.
            memory: returns the bytes that the KV may take now.
            use_threads: sets how many threads compute so many multiply-adds.
            grammars: the engine's.

        Raises:
            CheckpointError: for a checkpoint that is incomplete or not supported.
            ConfigError: for one of another vocabulary, or if there is no memory for a window.
        """
        directory = Path(config.speculation.draft_model)
        own = read_architecture(directory)
        _check_vocabulary(directory, own, model_dir, shape)
        dtype = dtype_of(config.dtype, own)
        weights = Weights(directory)
        self._device = device
        self._grammars = grammars
        self._use_threads = use_threads
        self._model = Model(weights, own, dtype, device)
        wanted = min(config.speculation.draft_context_tokens_max, context_tokens_max)
        #: Tokens of a sequence that it sees at most.
        self._context = min(wanted, own.context_tokens_max - DRAFT_TOKENS_MAX)
        if self._context < min(wanted, DRAFT_CONTEXT_TOKENS_MIN):
            raise ConfigError(FIELD, f"{directory} is for {own.context_tokens_max} tokens of context, which are too few")
        slab = engine_slab(own, config)
        self._blocks = -(-(self._context + DRAFT_TOKENS_MAX) // config.block_tokens)
        windows = min(config.speculation.draft_sequences_max or sequences_max, memory() // (self._blocks * slab.bytes))
        if windows < 1:
            problem = f"a window takes {self._blocks * slab.bytes} bytes, and there are {memory()}"
            raise ConfigError("engine.speculation.draft_context_tokens_max", problem)
        self._pool = KvPool(windows * self._blocks, slab, device, None)
        way = decode_way(self._pool, dtype, device, config.threads or torch.get_num_threads())
        self._batches = BatchBuilder(self._pool, rows_min(dtype, device, weights.quantised), way, device)
        #: Places in the pool that no window has.
        self._free = list(range(windows))
        self._windows: dict[RequestId, Window] = {}
        self._steps = 0
        #: Tokens of a piece that is read.
        self._piece = float(PIECE_TOKENS)
        #: Seconds that a step of the engine has taken lately beside this.
        self.step_s = 0.0

    def draft(self, asked: Sequence[Asked]) -> list[Drafted | None]:
        """Add drafts to sequences, of which none has any; None for those for which there was no room, or no time to read."""
        self._steps += 1
        windows = [self._window(one) for one in asked]
        done: list[Drafted | None] = [None] * len(asked)
        reading: list[int] = []
        drafting: list[int] = []
        for number, window in enumerate(windows):
            if window is not None:
                (drafting if window.unread <= UNREAD_MAX else reading).append(number)
        if reading:
            self._read(reading, windows, done)
        if drafting:
            self._draft(drafting, asked, windows, done)
        return done

    def forget(self, request: RequestId) -> None:
        """Let go of what was read for a request; unknown ids are ignored."""
        window = self._windows.pop(request, None)
        if window is not None:
            self._free.append(window.place)

    def _window(self, one: Asked) -> Window | None:
        """Return a sequence's window, up to date; None if there is no room for it."""
        window = self._windows.get(one.request)
        if window is None:
            if not self._free:
                self._free_idle()
            if not self._free:
                return None
            place = self._free.pop()
            table = np.arange(place * self._blocks, (place + 1) * self._blocks, dtype=np.int64)
            window = self._windows[one.request] = Window(place, table)
        window.used = self._steps
        window.follow(one.sequence.tokens, self._context)
        return window

    def _free_idle(self) -> None:
        """Take the window that was not used for longest, if that is long."""
        request = min(self._windows, key=lambda request: self._windows[request].used)
        if self._steps - self._windows[request].used > IDLE_STEPS:
            self.forget(request)

    def _read(self, numbers: Sequence[int], windows: Sequence[Window | None], done: list[Drafted | None]) -> None:
        """Read a piece of what these windows have not read."""
        left = int(self._piece)
        parts: list[Slice] = []
        readers: list[Window] = []
        began = time.perf_counter()
        for number in numbers:
            window = windows[number]
            assert window is not None
            size = min(window.unread - 1, left)
            if not size:
                break
            parts.append(Slice(RequestId(number), window.computed, size, 0, (), False))
            readers.append(window)
            left -= size
        self._logits(self._batches.build(parts, readers, range(len(parts))))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - began
        total = sum(part.count for part in parts)
        for part, window in zip(parts, readers, strict=True):
            window.computed += part.count
            done[part.request] = Drafted(0, seconds * part.count / total)
        if self.step_s and (not left or seconds > READING_SHARE * self.step_s):
            change = min(max(READING_SHARE * self.step_s / seconds, 0.5), 2.0)
            self._piece = min(max(self._piece * change, PIECE_TOKENS_MIN), PIECE_TOKENS_MAX)

    def _draft(
        self, numbers: Sequence[int], asked: Sequence[Asked], windows: Sequence[Window | None], done: list[Drafted | None]
    ) -> None:
        """Draft for these sequences, pass by pass."""
        began = time.perf_counter()
        drafting = list(numbers)
        while drafting:
            drafting = self._pass([(number, asked[number], window) for number in drafting if (window := windows[number])])
        seconds = time.perf_counter() - began
        total = sum(asked[number].sequence.drafted for number in numbers)
        for number in numbers:
            drafted = asked[number].sequence.drafted
            done[number] = Drafted(drafted, seconds * drafted / total if total else seconds / len(numbers))

    def _pass(self, members: "Sequence[tuple[int, Asked, Window]]") -> list[int]:
        """Draft a token for each of these sequences; return the numbers of those that may have another."""
        parts = [Slice(one.request, window.computed, window.unread, 0, (), True) for _, one, window in members]
        batch = self._batches.build(parts, [window for _, _, window in members], range(len(members)))
        order = [members[place] for place in batch.sampled_slices]
        masks = self._grammars.begin([one.sequence for _, one, _ in order], newest=True)
        logits = self._logits(batch)
        assert logits is not None, "every sequence asks for a token"
        best, tokens = (found.tolist() for found in (masks.apply(logits) if masks is not None else logits).max(-1))
        going_on: list[int] = []
        for (number, one, window), token, largest in zip(order, tokens, best, strict=True):
            window.computed = len(window.tokens)
            if largest == -torch.inf:  # its grammar lets nothing come
                continue
            window.tokens.append(token)
            one.sequence.tokens.append(token)
            one.sequence.drafted += 1
            if one.sequence.drafted < one.most and token not in one.sequence.ending:
                going_on.append(number)
        return sorted(going_on)

    def _logits(self, batch: StepBatch) -> Tensor | None:
        self._use_threads(batch.rows * self._model.row_operations)
        return self._model.logits([batch], self._pool)


def _check_vocabulary(directory: Path, own: Architecture, model_dir: Path, shape: Architecture) -> None:
    """Raise `ConfigError` unless a draft model's tokens mean what those of the model mean."""
    if own.vocabulary != shape.vocabulary:
        problem = f"{directory} has a vocabulary of {own.vocabulary} tokens, {model_dir} one of {shape.vocabulary}"
        raise ConfigError(FIELD, problem)
    theirs, ours = (_ordinary_tokens(one) for one in (directory, model_dir))
    if theirs is None or ours is None or theirs == ours:
        return
    differing = [(number, text) for text, number in ours.items() if theirs.get(text) != number]
    number, text = min(differing) if differing else (len(ours), "no token")
    raise ConfigError(FIELD, f"{directory} has another tokenizer than {model_dir}: token {number} is not {text!r} there")


def _ordinary_tokens(directory: Path) -> dict[str, int] | None:
    """Return a tokenizer's tokens, without those that were added for other ends than text; None if there is no tokenizer."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=False)
    except Exception as error:  # The library has no narrower class.
        raise ConfigError(FIELD, f"{path} cannot be read: {error}") from error
