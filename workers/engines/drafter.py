"""Drafts by a second, smaller model of the same vocabulary, for sequences in which nothing was found to look up.

It drafts for all of them together: a pass brings each its next token, the most likely one, until all have as many as they may
have. Whatever it says is verified, so that it only has to be right often: it sees a window of a sequence's last tokens, counted
from the window's beginning, whose keys and values lie in blocks of its own.

    tokens of the sequence      ..................................................
    the window                                 |--------- read --------|--unread--|    begins anew, half full, when it is full

What is unread is read in pieces, a few sequences at a time, so long as that takes a small share of a step: no step waits for a
prompt. Tokens that turn out otherwise than they were drafted are put right when the sequence is drafted for again; a sequence
that is forgotten gives its blocks back, and one that has not been drafted for in a while loses them to one that is.

In an engine all of that is part of its steps. In a process of its own (`drafts/process.py`) texts are read between questions, and
what would be asked for next, if all drafts turned out right, is drafted there too (`work_ahead`).
"""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


class Drafts(Protocol):
    """Whatever drafts for an engine's sequences: a model beside its own, or a pool of processes (`drafts/asking.py`)."""

    def draft(self, asked: Sequence[Asked]) -> list[Drafted | None]:
        """Add drafts to sequences, of which none has any; None for those for which nothing was done."""
        ...

    def stepped(self, seconds: float) -> None:
        """Take in how long a step of the engine took beside this."""
        ...

    def forget(self, request: RequestId) -> None:
        """Let go of what is known of a request; unknown ids are ignored."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


@dataclass(frozen=True, slots=True)
class WindowsWanted:
    """A draft model, and the windows that it is to have."""

    #: Its checkpoint.
    directory: Path
    #: Tokens of a sequence that it sees at most, and sequences that it sees at a time at most.
    context_tokens: int
    sequences: int
    #: Returns the bytes that their KV may take.
    memory: Callable[[], int]
    #: How fields of the cluster file begin that say so.
    within: str
    #: Rows that each pass is filled up to.
    rows: int = 0


class Window:
    """What the draft model sees of one sequence; a sequence of a batch by itself (`BatchSequence`)."""

    __slots__ = ("_checked", "ahead", "computed", "first", "place", "table", "tokens", "used")

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
        #: Drafts that it is to have once there is time for them.
        self.ahead = 0
        #: When it was drafted for last.
        self.used = 0

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def drafts(self) -> "array[int]":
        """What was drafted after the tokens that are known."""
        return self.tokens[self._checked :]

    def follow(self, tokens: "array[int]", context: int) -> None:
        """See to it that it has the sequence's last tokens, `context` at most; drafts behind stay if all before are right."""
        if not self.tokens or len(tokens) - self.first > context:
            self.first = len(tokens) - context // 2 if len(tokens) > context else 0
            self.tokens, self.computed = tokens[self.first :], 0
        else:
            known, drafts = tokens[self.first + self._checked :], self.drafts
            right = 0
            while right < min(len(known), len(drafts)) and known[right] == drafts[right]:
                right += 1
            if right < len(known):
                self.tokens[self._checked :] = known
                self.computed = min(self.computed, self._checked + right)
        self._checked = len(tokens) - self.first
        # The last token is computed once more if need be: what follows it is asked for.
        self.computed = min(self.computed, len(self.tokens) - 1)

    def hand_out(self, one: Asked) -> bool:
        """Add to a sequence what is drafted for it, as many as it may have. Returns whether it may have more."""
        sequence, drafts = one.sequence, self.drafts
        while sequence.drafted < min(one.most, len(drafts)):
            token = drafts[sequence.drafted]
            sequence.tokens.append(token)
            sequence.drafted += 1
            if token in sequence.ending:
                return False
        return sequence.drafted < one.most


class Drafter:
    """A draft model, and what it has read of which sequences."""

    def __init__(
        self,
        wanted: WindowsWanted,
        model_dir: Path,
        shape: Architecture,
        config: EngineConfig,
        device: torch.device,
        use_threads: Callable[[int], None],
        grammars: Grammars | None,
    ) -> None:
        """Load a draft model, and take memory for its KV.

        Args:
            wanted: the draft model and its windows.
            model_dir: the checkpoint of the model that verifies.
            shape: that model's.
            config: of the engine.
            device: the engine's.
            use_threads: sets how many threads compute so many multiply-adds.
            grammars: the engine's; None: drafts are not kept to any.

        Raises:
            CheckpointError: for a checkpoint that is incomplete or not supported.
            ConfigError: for one of another vocabulary, or if there is no memory for a window.
        """
        directory, within = wanted.directory, wanted.within
        own = read_architecture(directory)
        _check_vocabulary(directory, own, model_dir, shape, f"{within}model")
        dtype = dtype_of(config.dtype, own)
        weights = Weights(directory)
        self._device = device
        self._grammars = grammars
        self._use_threads = use_threads
        self._model = Model(weights, own, dtype, device)
        #: Tokens of a sequence that it sees at most.
        self.context_tokens = min(wanted.context_tokens, own.context_tokens_max - DRAFT_TOKENS_MAX)
        if self.context_tokens < min(wanted.context_tokens, DRAFT_CONTEXT_TOKENS_MIN):
            problem = f"{directory} is for {own.context_tokens_max} tokens of context, which are too few"
            raise ConfigError(f"{within}model", problem)
        slab = engine_slab(own, config)
        self._blocks = -(-(self.context_tokens + DRAFT_TOKENS_MAX) // config.block_tokens)
        memory = wanted.memory()
        #: Sequences that it sees at a time at most.
        self.sequences_max = min(wanted.sequences, memory // (self._blocks * slab.bytes))
        if self.sequences_max < 1:
            problem = f"a window takes {self._blocks * slab.bytes} bytes, and there are {memory}"
            raise ConfigError(f"{within}context_tokens_max", problem)
        self._pool = KvPool(self.sequences_max * self._blocks, slab, device, None)
        way = decode_way(self._pool, dtype, device, config.threads or torch.get_num_threads())
        rows = max(wanted.rows, rows_min(dtype, device, weights.quantised))
        self._batches = BatchBuilder(self._pool, rows, way, device)
        #: Places in the pool that no window has.
        self._free = list(range(self.sequences_max))
        self._windows: dict[RequestId, Window] = {}
        self._steps = 0
        #: Tokens of a piece that is read.
        self._piece = float(PIECE_TOKENS)
        #: Seconds that a step of the engine has taken lately beside this.
        self._step_s = 0.0

    @property
    def sequences(self) -> int:
        """Sequences that it sees now."""
        return len(self._windows)

    def sees(self, request: RequestId) -> bool:
        """Return whether a request has a window."""
        return request in self._windows

    def draft(self, asked: Sequence[Asked]) -> list[Drafted | None]:
        """See `Drafts.draft`: None for those for which there was no room, or no time to read."""
        done: list[Drafted | None] = [None] * len(asked)
        unread, read = self._look_at(asked)
        if unread:
            self._read_for(unread, done)
        if read:
            self._draft(read, done)
        return done

    def draft_what_is_read(self, asked: Sequence[Asked]) -> list[Drafted | None]:
        """The same, but read nothing for it: `read_on` does. None for those for which there was no room."""
        done: list[Drafted | None] = [None] * len(asked)
        unread, read = self._look_at(asked)
        for seen in unread:
            done[seen.number] = Drafted(0, 0.0)
        if read:
            self._draft(read, done)
        for seen in read:
            seen.window.ahead = min(2 * seen.asked.most + 1, DRAFT_TOKENS_MAX)
        return done

    def work_ahead(self) -> bool:
        """Read a piece of what is not read, or else draft a token for each sequence as if all its drafts were right.

        Returns False if nothing is left to do.
        """
        if self.read_on():
            return True
        drafting = [window for window in self._windows.values() if len(window.drafts) < window.ahead]
        if drafting:
            self._pass(drafting, None)
        return bool(drafting)

    def read_on(self) -> bool:
        """Read a piece of what is not read; return False if all is."""
        unread = [window for window in self._windows.values() if window.unread > UNREAD_MAX]
        if unread:
            self._read(unread)
        return bool(unread)

    def take_for_read(self) -> None:
        """Believe that all is read: what is drafted then means nothing, and takes as long as ever."""
        for window in self._windows.values():
            window.computed = len(window.tokens) - 1

    def stepped(self, seconds: float) -> None:
        """See `Drafts.stepped`."""
        self._step_s = seconds

    def forget(self, request: RequestId) -> None:
        """See `Drafts.forget`."""
        window = self._windows.pop(request, None)
        if window is not None:
            self._free.append(window.place)

    def close(self) -> None:
        """See `Drafts.close`."""
        self._windows.clear()
        del self._model, self._batches, self._pool

    def _look_at(self, asked: Sequence[Asked]) -> "tuple[list[_Seen], list[_Seen]]":
        """Bring sequences' windows up to date. Returns those that are to be read first, and those that are read."""
        self._steps += 1
        windows = [self._window(one) for one in asked]
        seen = [_Seen(number, asked[number], window) for number, window in enumerate(windows) if window is not None]
        unread = [one for one in seen if one.window.unread > UNREAD_MAX]
        return unread, [one for one in seen if one.window.unread <= UNREAD_MAX]

    def _window(self, one: Asked) -> Window | None:
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
        window.follow(one.sequence.tokens, self.context_tokens)
        return window

    def _free_idle(self) -> None:
        """Take the window that was not used for longest, if that is long."""
        request = min(self._windows, key=lambda request: self._windows[request].used)
        if self._steps - self._windows[request].used > IDLE_STEPS:
            self.forget(request)

    def _read_for(self, unread: "Sequence[_Seen]", done: list[Drafted | None]) -> None:
        """Read a piece of what these windows have not read, and say so of each of which something was read."""
        began = time.perf_counter()
        read = self._read([seen.window for seen in unread])
        seconds, total = time.perf_counter() - began, sum(read)
        for seen, count in zip(unread, read, strict=False):
            done[seen.number] = Drafted(0, seconds * count / total)
        if self._step_s and (total == int(self._piece) or seconds > READING_SHARE * self._step_s):
            change = min(max(READING_SHARE * self._step_s / seconds, 0.5), 2.0)
            self._piece = min(max(self._piece * change, PIECE_TOKENS_MIN), PIECE_TOKENS_MAX)

    def _read(self, windows: Sequence[Window]) -> list[int]:
        """Read a piece; return how many tokens of the first windows were read, as far as it went."""
        left = int(self._piece)
        parts: list[Slice] = []
        for window in windows:
            size = min(window.unread - 1, left)
            if not size:
                break
            parts.append(Slice(RequestId(len(parts)), window.computed, size, 0, (), False))
            left -= size
        self._logits(self._batches.build(parts, windows[: len(parts)], range(len(parts))))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for part, window in zip(parts, windows, strict=False):
            window.computed += part.count
        return [part.count for part in parts]

    def _draft(self, read: "Sequence[_Seen]", done: list[Drafted | None]) -> None:
        """Draft for these sequences, pass by pass."""
        began = time.perf_counter()
        drafting = [seen for seen in read if seen.window.hand_out(seen.asked)]
        while drafting:
            went = self._pass([seen.window for seen in drafting], [seen.asked.sequence for seen in drafting])
            drafting = [seen for seen, has in zip(drafting, went, strict=True) if has and seen.window.hand_out(seen.asked)]
        seconds = time.perf_counter() - began
        total = sum(seen.asked.sequence.drafted for seen in read)
        for seen in read:
            drafted = seen.asked.sequence.drafted
            done[seen.number] = Drafted(drafted, seconds * drafted / total if total else seconds / len(read))

    def _pass(self, windows: Sequence[Window], sequences: Sequence[TokenSequence] | None) -> list[bool]:
        """Draft a token for each of these windows, of what the sequences' grammars let come; return of which one came."""
        parts = [Slice(RequestId(number), window.computed, window.unread, 0, (), True) for number, window in enumerate(windows)]
        batch = self._batches.build(parts, windows, range(len(windows)))
        masks = None
        if self._grammars is not None and sequences is not None:
            masks = self._grammars.begin([sequences[number] for number in batch.sampled_slices], newest=True)
        logits = self._logits(batch)
        assert logits is not None, "every sequence asks for a token"
        best, tokens = (found.tolist() for found in (masks.apply(logits) if masks is not None else logits).max(-1))
        went = [False] * len(windows)
        for number, token, largest in zip(batch.sampled_slices, tokens, best, strict=True):
            windows[number].computed = len(windows[number].tokens)
            if largest != -torch.inf:  # else its grammar lets nothing come
                windows[number].tokens.append(token)
                went[number] = True
        return went

    def _logits(self, batch: StepBatch) -> Tensor | None:
        self._use_threads(batch.rows * self._model.row_operations)
        return self._model.logits([batch], self._pool)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A sequence that is asked for, its place among those, and its window."""

    number: int
    asked: Asked
    window: Window


def _check_vocabulary(directory: Path, own: Architecture, model_dir: Path, shape: Architecture, field: str) -> None:
    """Raise `ConfigError` unless a draft model's tokens mean what those of the model mean."""
    if own.vocabulary != shape.vocabulary:
        problem = f"{directory} has a vocabulary of {own.vocabulary} tokens, {model_dir} one of {shape.vocabulary}"
        raise ConfigError(field, problem)
    theirs, ours = (_ordinary_tokens(one, field) for one in (directory, model_dir))
    if theirs is None or ours is None or theirs == ours:
        return
    differing = [(number, text) for text, number in ours.items() if theirs.get(text) != number]
    number, text = min(differing) if differing else (len(ours), "no token")
    raise ConfigError(field, f"{directory} has another tokenizer than {model_dir}: token {number} is not {text!r} there")


def _ordinary_tokens(directory: Path, field: str) -> dict[str, int] | None:
    """Return a tokenizer's tokens, without those that were added for other ends than text; None if there is no tokenizer."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=False)
    except Exception as error:  # The library has no narrower class.
        raise ConfigError(field, f"{path} cannot be read: {error}") from error
