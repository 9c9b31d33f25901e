"""From text to tokens and block hashes, at the price of what is new: recent prompts are kept and their common part is reused.

    old prompt   [ system | tools | user | assistant | user | assistant-> ]
    new prompt   [ system | tools | user | assistant | user | assistant .... | tool result | assistant-> ]
                  <------------- equal, compared as memory ----------------->
                  <--- tokens and hashes kept, up to a cut ----><-- tokenised and hashed now ------->

A prompt is found again only under the root that its hash chain starts from, which is made of its tenant and salt: what is in
somebody else's prompts cannot be told from the time that one's own take.

Which positions are cuts, and why the result is exactly that of tokenising everything, is said in `segments.py`.

See also: `templates.py` for how messages become text, `models.py` for what a checkpoint folder says.
"""

import asyncio
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from orchestrator.core.blocks import extend_hashes
from orchestrator.core.types import BlockHash
from orchestrator.live.text.segments import Segmenter
from orchestrator.live.turns import Prompt

#: Bytes of a packed token.
TOKEN_BYTES = 4
#: Shorter texts are not kept: tokenising them costs less than finding them.
KEPT_CHARS_MIN = 1024
#: From this many new characters on (some 20 ms) tokenising moves to a thread, so that other streams go on meanwhile.
OFFLOADED_CHARS_MIN = 64 * 1024
#: Prompts are found by their first 256, 512, 1024, ... characters, and up to the second figure by all of them.
FIRST_RUNG_CHARS = 256
WHOLE_RUNG_CHARS_MAX = 128 * 1024
#: Texts are compared in pieces of this size, which stay in the processor's cache.
_COMPARE_CHARS = 64 * 1024
#: An older prompt that a newer one extends, but for its last characters (the opened answer), is not kept beside it.
_TAIL_CHARS = 256

#: Who sent a prompt: parts that name a session for all its turns.
SessionKey = tuple[object, ...]


@dataclass(slots=True, eq=False)
class _Entry:
    """A prompt's text and everything computed from it."""

    serial: int
    text: str
    #: uint32 little-endian, packed; fixed tokens in front of the text included.
    tokens: bytes
    #: Characters and tokens before each cut; the first is the text's start.
    cut_chars: list[int]
    cut_tokens: list[int]
    #: Chained hashes of the text up to each rung of the ladder.
    rungs: list[int]
    session: SessionKey | None
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class _Reuse:
    """What a new text has in common with a kept one: the first `shared` characters, the first `cuts` of its cuts."""

    entry: _Entry
    shared: int
    cuts: int

    @property
    def chars(self) -> int:
        """Characters whose tokens are known."""
        return self.entry.cut_chars[self.cuts - 1]

    @property
    def tokens(self) -> int:
        """Tokens of those characters."""
        return self.entry.cut_tokens[self.cuts - 1]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A text from `cut_chars[0]` to its end; `cut_tokens` counts from there."""

    packed: bytes
    cut_chars: list[int]
    cut_tokens: list[int]


class PromptTokeniser:
    """One model's tokenizer with a bounded memory of one tenant's recent prompts. Belongs to one event loop.

    Args:
        tokenizer: without truncation and padding.
        segmenter: made for the same tokenizer.
        prefix: tokens in front of every text that asks for them (the beginning-of-sequence token of most models).
        block_tokens: tokens in a KV block.
        prompts_max: prompts kept.
        chars_max: characters kept in all of them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        segmenter: Segmenter,
        prefix: Sequence[int],
        block_tokens: int,
        prompts_max: int,
        chars_max: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._segmenter = segmenter
        self._prefix = array("I", prefix).tobytes()
        self._block_tokens = block_tokens
        self._prompts_max = prompts_max
        self._chars_max = chars_max
        self._serial = 0
        #: Always the sum over `_entries`, at most `_chars_max`.
        self._chars = 0
        #: Least recently used first.
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._by_session: dict[SessionKey, _Entry] = {}
        #: What was last stored with a text that starts so.
        self._by_rung: dict[int, _Entry] = {}
        #: Short texts, found whole or not at all: at most `prompts_max`, least recently used first.
        self._short: OrderedDict[tuple[str, BlockHash, bool], Prompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def chars(self) -> int:
        """Characters kept."""
        return self._chars

    def encode(self, text: str, root: BlockHash, session: SessionKey | None = None, prefixed: bool = False) -> Prompt:
        """Return the text's tokens and block hashes.

        Args:
            text: the whole prompt.
            root: what its hash chain starts from.
            session: finds the turn before.
            prefixed: put the model's fixed tokens in front.
        """
        if len(text) < KEPT_CHARS_MIN:
            return self._small(text, root, prefixed)
        reuse = self._find(text, root, session, prefixed)
        if reuse is not None and reuse.shared == len(text) == len(reuse.entry.text):
            self._entries.move_to_end(reuse.entry.serial)
            return reuse.entry.prompt
        return self._remember(text, root, session, prefixed, reuse, self._tokenise(text, reuse.chars if reuse else 0))

    async def encode_aside(self, text: str, root: BlockHash, session: SessionKey | None = None, prefixed: bool = False) -> Prompt:
        """Like `encode`, but tokenises much new text in a thread."""
        reuse = self._find(text, root, session, prefixed) if len(text) >= OFFLOADED_CHARS_MIN else None
        start = reuse.chars if reuse else 0
        if len(text) - start < OFFLOADED_CHARS_MIN:
            return self.encode(text, root, session, prefixed)
        tokens = await asyncio.to_thread(self._tokenise, text, start)
        return self._remember(text, root, session, prefixed, reuse, tokens)

    def tokens_before(self, text: str, chars: int, root: BlockHash) -> int:
        """Return how many of an unprefixed text's tokens lie within its first characters.

        Args:
            text: the whole prompt, best one that was encoded just now.
            chars: how many characters.
            root: what its hash chain starts from.
        """
        reuse = self._find(text, root, None, False) if len(text) >= KEPT_CHARS_MIN else None
        known, tokens, end = 0, 0, len(text)
        if reuse is not None:
            entry, number = reuse.entry, bisect_right(reuse.entry.cut_chars, chars, hi=reuse.cuts) - 1
            known, tokens = entry.cut_chars[number], entry.cut_tokens[number]
            end = entry.cut_chars[number + 1] if number + 1 < reuse.cuts else len(text)
        offsets = self._tokenizer.encode(text[known:end], add_special_tokens=False).offsets
        return tokens + sum(stop <= chars - known for _, stop in offsets)

    def adopt(self, tokens: bytes, root: BlockHash) -> Prompt:
        """Return a prompt that came as tokens (uint32 little-endian, packed)."""
        hashes = extend_hashes(root, tokens, self._block_tokens)
        return Prompt(tokens=tokens, count=len(tokens) // TOKEN_BYTES, hashes=tuple(hashes), hash_root=root)

    def _small(self, text: str, root: BlockHash, prefixed: bool) -> Prompt:
        key = text, root, prefixed
        prompt = self._short.get(key)
        if prompt is not None:
            self._short.move_to_end(key)
            return prompt
        packed = array("I", self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids).tobytes()
        prompt = self._short[key] = self.adopt(self._prefix + packed if prefixed else packed, root)
        if len(self._short) > self._prompts_max:
            self._short.popitem(last=False)
        return prompt

    # --- finding what is shared ---------------------------------------------------------------------------------------

    def _find(self, text: str, root: BlockHash, session: SessionKey | None, prefixed: bool) -> _Reuse | None:
        """Return the best reuse: the session's own last prompt if it covers half of the text, else what starts alike."""
        own = self._by_session.get((*session, root, prefixed)) if session is not None else None
        reuse = self._compare(own, text) if own is not None else None
        if reuse is not None and reuse.chars * 2 >= len(text):
            return reuse
        for rung in reversed(_climb(text, [], 0, (root, prefixed))):
            entry = self._by_rung.get(rung)
            if entry is not None and entry is not own:
                other = self._compare(entry, text)
                if other is not None and (reuse is None or other.shared > reuse.shared):
                    reuse = other
                break
        return reuse

    def _compare(self, entry: _Entry, text: str) -> _Reuse | None:
        shared = shared_chars(entry.text, text)
        cuts = bisect_right(entry.cut_chars, shared - self._segmenter.margin)
        return _Reuse(entry, shared, cuts) if cuts else None

    # --- what is new --------------------------------------------------------------------------------------------------

    def _tokenise(self, text: str, start: int) -> _Tokens:
        """Tokenise `text` from a cut (or 0) on. Touches no state: it may run in a thread."""
        cut_chars = [start, *self._segmenter.cuts(text, start)]
        segments = [text[begin:end] for begin, end in zip(cut_chars, [*cut_chars[1:], len(text)], strict=True)]
        packed = array("I")
        cut_tokens: list[int] = []
        # The fast call leaves out offsets into the text; for one segment too it costs a third less than `encode`.
        for encoding in self._tokenizer.encode_batch_fast(segments, add_special_tokens=False):
            cut_tokens.append(len(packed))
            packed.extend(encoding.ids)
        return _Tokens(packed.tobytes(), cut_chars, cut_tokens)

    def _remember(
        self, text: str, root: BlockHash, session: SessionKey | None, prefixed: bool, reuse: _Reuse | None, new: _Tokens
    ) -> Prompt:
        """Store a tokenised text in place of what it extends; return it as a prompt."""
        self._serial += 1
        key = (*session, root, prefixed) if session is not None else None
        if reuse is None:
            before = self._prefix if prefixed else b""
            cut_chars, cut_tokens, rungs = [], [], []
        else:
            old = reuse.entry
            before = old.tokens[: reuse.tokens * TOKEN_BYTES]
            cut_chars, cut_tokens = old.cut_chars[: reuse.cuts - 1], old.cut_tokens[: reuse.cuts - 1]
            rungs = old.rungs
        offset, tokens = len(before) // TOKEN_BYTES, before + new.packed
        prompt = self._hashed(tokens, root, reuse)
        entry = _Entry(
            self._serial,
            text,
            tokens,
            cut_chars + new.cut_chars,
            cut_tokens + [offset + count for count in new.cut_tokens],
            _climb(text, rungs, reuse.shared if reuse else 0, (root, prefixed)),
            key,
            prompt,
        )
        if reuse is not None and reuse.shared >= len(reuse.entry.text) - _TAIL_CHARS:
            self._drop(reuse.entry)
        self._store(entry)
        return prompt

    def _hashed(self, tokens: bytes, root: BlockHash, reuse: _Reuse | None) -> Prompt:
        """Return tokens as a prompt, hashing only blocks that a reused entry does not have."""
        kept = reuse.entry.prompt.hashes[: reuse.tokens // self._block_tokens] if reuse is not None else ()
        rest = memoryview(tokens)[len(kept) * self._block_tokens * TOKEN_BYTES :]
        added = extend_hashes(kept[-1] if kept else root, rest, self._block_tokens)
        return Prompt(tokens=tokens, count=len(tokens) // TOKEN_BYTES, hashes=(*kept, *added), hash_root=root)

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _store(self, entry: _Entry) -> None:
        if len(entry.text) > self._chars_max:
            return
        while self._entries and (len(self._entries) >= self._prompts_max or self._chars + len(entry.text) > self._chars_max):
            self._drop(next(iter(self._entries.values())))
        self._entries[entry.serial] = entry
        self._chars += len(entry.text)
        for rung in entry.rungs:
            self._by_rung[rung] = entry
        if entry.session is not None:
            self._by_session[entry.session] = entry

    def _drop(self, entry: _Entry) -> None:
        if self._entries.pop(entry.serial, None) is None:
            return
        self._chars -= len(entry.text)
        for rung in entry.rungs:
            if self._by_rung.get(rung) is entry:
                del self._by_rung[rung]
        if entry.session is not None and self._by_session.get(entry.session) is entry:
            del self._by_session[entry.session]


def _climb(text: str, known: list[int], shared: int, foot: tuple[BlockHash, bool]) -> list[int]:
    """Return the rungs of a text: chained hashes of its first 256, 512, 1024, ... characters, then of a short text's all.

    They start from `foot`, in which texts differ that must not find each other. `known` are the rungs of a text whose first
    `shared` characters are the same.
    """
    rungs: list[int] = []
    begin, end = 0, FIRST_RUNG_CHARS
    while end <= len(text):
        place = len(rungs)
        if end <= shared and place < len(known):
            rungs.append(known[place])
        else:
            rungs.append(hash((rungs[-1] if rungs else foot, text[begin:end])))
        begin, end = end, end * 2
    if len(text) <= WHOLE_RUNG_CHARS_MAX:
        rungs.append(hash((rungs[-1] if rungs else foot, text[begin:], len(text))))
    return rungs


def shared_chars(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts, at the speed of comparing memory."""
    limit = min(len(one), len(other))
    low = 0
    while low < limit and one[low : low + _COMPARE_CHARS] == other[low : low + _COMPARE_CHARS]:
        low += _COMPARE_CHARS
    if low >= limit:
        return limit
    high = min(low + _COMPARE_CHARS, limit)
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
