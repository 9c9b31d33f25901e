"""Keeps outputs to their grammars: which tokens may come next, computed beside a step's forward pass.

    Sampling.grammar --> Walk (one sequence's way through it) --begin--> Masks (one row for each row of logits) --> sampler.py

A grammar speaks of text and a model of tokens: `llguidance` has the vocabulary as a tree of bytes, and finds what of it may
follow. Ends and other special tokens are no text. Where the grammar may end is told by a token of our own that no model has, and
there the sequence's own ends may come, nowhere else.

A walk goes on with what the sequence has in the meantime, whichever way it came there: sampled here, accepted from a draft, or
generated elsewhere before.
"""

import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from orchestrator.core.types import Sampling
from orchestrator.profiles.decoders import falls_back_to_bytes, is_byte_level, local_steps, lone_bytes
from orchestrator.profiles.model_config import read_config
from orchestrator.profiles.specials import end_tokens, read_named, special_names

#: Grammars kept ready, those used last.
GRAMMARS_MAX = 128
#: Threads that look for several rows' tokens at once: a row takes 10 to 100 us most times, seldom some milliseconds.
THREADS = 2
#: No token of any model.
_END = "<|the grammar may end here|>"


class Lexicon:
    """A checkpoint's tokens as grammars see them.

    Args:
        model_dir: a checkpoint directory with its tokenizer.json.
        vocabulary: the model's; token ids are below it.

    Raises:
        ValueError: if there is no tokenizer, or one whose tokens have no text of their own.
    """

    def __init__(self, model_dir: Path, vocabulary: int) -> None:
        try:
            tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            ends = map(tokenizer.id_to_token, end_tokens(read_config(model_dir), vocabulary))
            names = {
                name
                for name in (*special_names(read_named(model_dir)), *ends)
                if name and tokenizer.token_to_id(name) is not None
            }
            tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (*sorted(names), _END)])
            end = tokenizer.token_to_id(_END)
            assert end is not None, "what was added is there"
            self.tokens = _read(tokenizer, max(vocabulary, end + 1), end)
        except Exception as error:  # Neither library has a narrower class.
            raise ValueError(f"{model_dir / 'tokenizer.json'} cannot be used with grammars: {error}") from error
        #: Stands for the end in masks.
        self.end = end
        #: Of 32 tokens each, in a mask.
        self.words = -(-self.tokens.vocab_size // 32)
        #: A bit for each token that reads as the text that it writes; None: all do.
        self.right: NDArray[np.uint32] | None = None
        if misread := _misread(tokenizer, self.tokens):
            self.right = np.full(self.words, ~np.uint32(0))
            for token in misread:
                self.right[token >> 5] &= ~np.uint32(1 << (token & 31))


def _read(tokenizer: Tokenizer, size: int, end: int) -> LLTokenizer:
    """Return a tokenizer as grammars read it. Raises `ValueError`."""
    description = json.loads(tokenizer.to_str())
    decoder = description["decoder"]
    steps = local_steps(decoder)
    if steps is None:
        raise ValueError("its tokens have no text of their own")
    if is_byte_level(decoder):
        return LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=end)
    # The library knows one way in which tokens that are no bytes may be written.
    description["decoder"] = {"type": "Sequence", "decoders": [*map(_replacing, steps), {"type": "ByteFallback"}]}
    for part in (description["pre_tokenizer"], *((description["pre_tokenizer"] or {}).get("pretokenizers") or ())):
        if part is not None and part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    return LLTokenizer(json.dumps(description), n_vocab=size, eos_token=end)


def _replacing(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step of a decoder with what makes spaces written out."""
    if step["type"] != "Metaspace":
        return step
    return {"type": "Replace", "pattern": {"String": step["replacement"]}, "content": " "}


def _misread(tokenizer: Tokenizer, tokens: LLTokenizer) -> list[int]:
    """Return tokens that are not read as the text that they write."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    if is_byte_level(decoder):
        return []
    known = lone_bytes(tokenizer) if falls_back_to_bytes(decoder) else {}
    asked = [token for token in tokenizer.get_vocab().values() if token not in known and not tokens.is_special_token(token)]
    # The first token of a text may lose a space: a second one does not.
    once, twice = (tokenizer.decode_batch([[token] * count for token in asked], skip_special_tokens=False) for count in (1, 2))
    written = zip(asked, once, twice, strict=True)
    return [token for token, one, both in written if both[len(one) :].encode() != tokens.decode_bytes([token])]


class Walk:
    """One sequence's way through its grammar.

    Args:
        open_matcher: returns a fresh matcher of the grammar; asked for once, when the first token is wanted.
        start: tokens of the sequence that are not the grammar's: its prompt.
        ends: tokens that may come exactly where the grammar may end.
    """

    __slots__ = ("_matcher", "_open_matcher", "ends", "failure", "walked")

    def __init__(self, open_matcher: Callable[[], LLMatcher], start: int, ends: Sequence[int]) -> None:
        self._open_matcher = open_matcher
        self._matcher: LLMatcher | None = None
        #: Tokens of the sequence up to where it is.
        self.walked = start
        self.ends = ends
        #: Why it cannot go on.
        self.failure: str | None = None

    def go_on(self, tokens: "array[int]") -> LLMatcher | None:
        """Walk on over tokens; return the matcher as it stands then, None if there is no way."""
        if self.failure is None:
            if self._matcher is None:
                self._matcher = self._open_matcher()
            self.walked += len(tokens)
            self._matcher.consume_tokens(tokens.tolist())
            self.look()
        return self._matcher if self.failure is None else None

    def look(self) -> None:
        """Notice if there is no way."""
        assert self._matcher is not None
        if self.failure is None and self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            self.failure = f"the output cannot be kept to its grammar: {reason}"

    def passable(self, tokens: "array[int]", drafts: "array[int]") -> int:
        """Return how many of some drafts, which follow all tokens of the sequence, are in the grammar, the first ones."""
        matcher = self.go_on(tokens[self.walked :])
        return matcher.validate_tokens(drafts.tolist()) if matcher is not None else 0


class Walker(Protocol):
    """What is asked of a sequence."""

    tokens: "array[int]"
    drafted: int
    walk: Walk | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A sequence in a step: what it has that its walk has not gone over, and what it has drafted besides."""

    walk: Walk
    fresh: "array[int]"
    drafts: "array[int]"

    @property
    def rows(self) -> int:
        return 1 + len(self.drafts)


class Masks:
    """Which tokens may come in some rows of a step's logits; found while the logits are computed."""

    def __init__(self, found: "Future[NDArray[np.uint32]]", numbers: Sequence[int], rows: int) -> None:
        self._found = found
        self._numbers = numbers
        self._rows = rows

    def apply(self, logits: Tensor) -> Tensor:
        """Return logits [rows, vocabulary] in which all tokens that may not come have none; changes them in place."""
        assert len(logits) == self._rows, f"{len(logits)} rows of logits and masks for {self._rows}"
        hidden = _unpacked(~self._found.result(), logits)
        if len(self._numbers) == self._rows:
            return logits.masked_fill_(hidden, -torch.inf)
        numbers = torch.tensor(self._numbers, device=logits.device)
        return logits.index_copy_(0, numbers, logits[numbers].masked_fill_(hidden, -torch.inf))


def _unpacked(words: "NDArray[np.uint32]", like: Tensor) -> Tensor:
    """Return bits as truths, a column a token, where the logits are."""
    vocabulary = like.shape[1]
    if like.device.type == "cpu":
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=vocabulary, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    packed = torch.from_numpy(words.view(np.int32)).to(like.device, non_blocking=True)
    places = torch.arange(32, dtype=torch.int32, device=like.device)
    return (packed[:, :, None] >> places & 1).view(len(words), -1)[:, :vocabulary].bool()


class Grammars:
    """An engine's grammars.

    Args:
        model_dir: a checkpoint directory. If its tokenizer cannot be used only sequences with a grammar fail.
        vocabulary: the model's.
    """

    def __init__(self, model_dir: Path, vocabulary: int) -> None:
        self._lexicon: Lexicon | None = None
        self._problem = ""
        try:
            self._lexicon = Lexicon(model_dir, vocabulary)
        except ValueError as error:
            self._problem = str(error)
        self._executor = LLExecutor(THREADS)
        #: Looks for masks while the engine's thread computes.
        self._thread = ThreadPoolExecutor(1, "grammars")
        #: Fresh matchers, least recently used first; touched by whoever walks, one at a time.
        self._fresh: OrderedDict[str, LLMatcher] = OrderedDict()

    def walk(self, sampling: Sampling, start: int) -> Walk | None:
        """Return the walk of a new sequence whose output starts there; None for one without a grammar."""
        if not sampling.grammar:
            return None
        lexicon = self._lexicon
        special = lexicon.tokens.is_special_token if lexicon is not None else lambda _: False
        ends = [token for token in sampling.stop_token_ids if special(token)]
        walk = Walk(lambda: self._matcher(sampling.grammar), start, ends)
        if lexicon is None:
            walk.failure = self._problem
        elif not ends:
            walk.failure = "an output with a grammar needs an end token among its stop tokens"
        return walk

    def begin(self, sequences: Sequence[Walker], newest: bool = False) -> Masks | None:
        """Begin to find which tokens may come next, for the rows that some sequences have in a step's logits.

        Each has one row, and one more for each of its drafts; with `newest` only the last of these. Returns None if none of them
        has a grammar.
        """
        wanted: list[_Wanted] = []
        numbers: list[int] = []
        rows = 0
        for sequence in sequences:
            if (walk := sequence.walk) is not None:
                known = len(sequence.tokens) - sequence.drafted
                wanted.append(_Wanted(walk, sequence.tokens[walk.walked : known], sequence.tokens[known:]))
                numbers += range(rows, rows + (1 if newest else 1 + sequence.drafted))
            rows += 1 if newest else 1 + sequence.drafted
        if not wanted:
            return None
        return Masks(self._thread.submit(self._find, wanted, newest), numbers, rows)

    def close(self) -> None:
        """Let go of its thread."""
        self._thread.shutdown()

    def _find(self, wanted: Sequence[_Wanted], newest: bool) -> "NDArray[np.uint32]":
        """Return a bit for each token and row: whether it may come. No token may where there is no way.

        With `newest` there is one row for each, its last one.
        """
        lexicon = self._lexicon
        rows = sum(one.rows for one in wanted)
        words = np.zeros((rows, lexicon.words if lexicon is not None else 0), np.uint32)
        if lexicon is None:
            return words
        plain: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        row = 0
        for one in wanted:
            if (matcher := one.walk.go_on(one.fresh)) is not None:
                if one.drafts:
                    drafted.append((matcher, row, one.drafts.tolist()))
                else:
                    plain.append((matcher, row))
            row += one.rows
        place = words.ctypes.data, words.strides[0], rows
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *place)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *place)
        if lexicon.right is not None:
            words &= lexicon.right
        row = 0
        for one in wanted:
            one.walk.look()
            self._end(words[row : row + one.rows], one.walk, lexicon.end)
            row += one.rows
        return words[np.cumsum([one.rows for one in wanted]) - 1] if newest else words

    @staticmethod
    def _end(words: "NDArray[np.uint32]", walk: Walk, end: int) -> None:
        """Put a sequence's own ends in the place of the one that stands for them."""
        place, bit = end >> 5, np.uint32(1 << (end & 31))
        ending = (words[:, place] & bit) != 0
        words[:, place] &= ~bit
        for token in walk.ends:
            place, bit = token >> 5, np.uint32(1 << (token & 31))
            words[:, place] = np.where(ending, words[:, place] | bit, words[:, place] & ~bit)

    def _matcher(self, grammar: str) -> LLMatcher:
        """Return a fresh matcher; one of a grammar that was there before costs a copy."""
        assert self._lexicon is not None
        fresh = self._fresh.pop(grammar, None) or LLMatcher(self._lexicon.tokens, grammar, log_level=0)
        self._fresh[grammar] = fresh
        if len(self._fresh) > GRAMMARS_MAX:
            self._fresh.popitem(last=False)
        return fresh.deep_copy()
