"""From tokens back to text, one token at a time and whole characters only.

Rule 1: what comes out is what the tokens add to the prompt. Joined, the pieces are decode(prompt + answer) without what it has in
common with decode(prompt): a tokenizer that drops the first space of a text must not drop that of an answer.

Rule 2: what comes out is never taken back, so it is kept back until nothing that follows can change it.

See also: `stops.py`, which cuts the text; `generation.py`, which puts the parts together.
"""

from codecs import getincrementaldecoder
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, cast

from tokenizers import Tokenizer

from orchestrator.profiles.decoders import BYTE_OF, falls_back_to_bytes, is_byte_level, lone_bytes

_Utf8Decoder = getincrementaldecoder("utf-8")
_REPLACEMENT = "\ufffd"
#: No vocabulary is so large; decoders pass over what they do not know.
_NO_TOKEN = (1 << 32) - 1
#: Tokens of the prompt that show in the text and that an answer's first ones are decoded after. One would do for all decoders
#: but for those that join bytes, which need as many as a character has.
_CONTEXT_TOKENS = 4
#: Tokens of the prompt looked at to find them: after so many that do not show there is nothing to continue.
_CONTEXT_SEARCH_MAX = 256


class Detokeniser(Protocol):
    """Turns one generation's tokens into text."""

    def add(self, token: int) -> str:
        """Return the text that is certain now: empty while a character is incomplete or for a hidden token."""
        ...

    def finish(self) -> str:
        """Return what was still kept back; nothing is added afterwards."""
        ...

    @property
    def kept_chars(self) -> int:
        """Whole characters kept back: a next token's text starts so many after what came out."""
        ...


class Vocabulary:
    """Every token's text, and detokenisers over it.

    Args:
        tokenizer: the model's.
        description: its tokenizer.json.
        special: more tokens that do not show, beside those that tokenizer.json calls special.
        marks: special tokens that something reads in the text of an answer; see `detokeniser`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        description: Mapping[str, Any],
        special: Collection[str] = (),
        marks: Collection[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        added = cast(list[dict[str, Any]], description.get("added_tokens") or [])
        names = {cast(int, token["id"]): cast(str, token["content"]) for token in added if token["special"]}
        more = {number: name for name in special if (number := tokenizer.token_to_id(name)) is not None}
        #: What special tokens are called. They do not show.
        self._special = names | more
        self._marks = {number: name for number, name in self._special.items() if name in marks}
        decoder = description.get("decoder")
        self._byte_level = is_byte_level(decoder)
        #: Bytes that tokens of a vocabulary with byte fallback stand for: a run of them is decoded as one.
        self._lone_bytes = lone_bytes(tokenizer) if falls_back_to_bytes(decoder) else {}
        #: Ids that models with a padded vocabulary may choose and that no text belongs to, but for those past the last.
        ids = set[int]() if self._byte_level else set(tokenizer.get_vocab().values())
        self._last = max(ids, default=0)
        self._gaps = frozenset(range(self._last)) - ids
        self._hidden = self._gaps | self._special.keys()
        self._hidden_marked = self._hidden - self._marks.keys()
        #: What tokens say alone, which the next are told from; filled as tokens are seen.
        self._alone: dict[int, str] = {}
        #: Filled as tokens are seen, so bounded by the vocabulary. None: the bytes are no whole characters.
        self._texts: dict[int, str | None] = {}
        self._bytes: dict[int, bytes] = {}
        #: A token that others' texts are told from when they follow it; found when it is first needed.
        self._anchor: tuple[int, str] | None = None

    @property
    def marks(self) -> Mapping[str, int]:
        """The marks that are special tokens, no text to anybody else, with their numbers."""
        return {name: number for number, name in self._marks.items()}

    def detokeniser(self, prompt: bytes = b"", marked: bool = False, special: bool = False) -> Detokeniser:
        """Return one for a new generation.

        Args:
            prompt: the tokens it continues (uint32, packed); empty if it continues nothing.
            marked: special tokens that mark parts of an answer show in its text.
            special: all of them do.
        """
        marks = self._marks if marked else {}
        if self._byte_level:
            text_of = self.named_text if special else self.marked_text if marks else self.token_text
            return _ByteLevelDetokeniser(text_of, self.token_bytes, self._open_bytes(prompt))
        hidden = self._gaps if special else self._hidden_marked if marks else self._hidden
        return _WindowDetokeniser(self._tokenizer, hidden, self._last, self._lone_bytes, self._alone, self._context(prompt))

    def token_bytes(self, token: int) -> bytes:
        """Return a token's own bytes, special tokens' names included (for log probabilities)."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._make_bytes(token)
        return found

    def token_text(self, token: int) -> str | None:
        """Return what a token of bytes adds to the text: nothing if it is hidden; None if its bytes need their neighbours'."""
        try:
            return self._texts[token]
        except KeyError:
            pass
        text: str | None = ""
        if token not in self._special:
            try:
                text = self.token_bytes(token).decode()
            except UnicodeDecodeError:
                text = None
        self._texts[token] = text
        return text

    def marked_text(self, token: int) -> str | None:
        """Return what `token_text` does, but a mark's name."""
        return self._marks[token] if token in self._marks else self.token_text(token)

    def named_text(self, token: int) -> str | None:
        """Return what `token_text` does, but any special token's name."""
        return self._special[token] if token in self._special else self.token_text(token)

    def _make_bytes(self, token: int) -> bytes:
        content = self._tokenizer.id_to_token(token)
        if content is None:
            return b""
        if token in self._special:
            return content.encode()
        if token in self._lone_bytes:
            return bytes([self._lone_bytes[token]])
        if not self._byte_level:
            # Alone it would lose what decoders take from the first token of a text, most often a space.
            anchor, before = self._find_anchor()
            return self._tokenizer.decode([anchor, token], skip_special_tokens=False)[len(before) :].encode()
        try:
            return bytes([BYTE_OF[character] for character in content])
        except KeyError:
            # An added token written as it is; the decoder leaves such ones alone.
            return content.encode()

    def _find_anchor(self) -> tuple[int, str]:
        """Return a token that is a plain word or letter, and what it says; if there is none, one that says nothing."""
        if self._anchor is None:
            decode = self._tokenizer.decode
            tokens = (token for token in range(self._tokenizer.get_vocab_size()) if token not in self._lone_bytes)
            words = ((token, decode([token])) for token in tokens if token not in self._special)
            self._anchor = next((pair for pair in words if pair[1].isascii() and pair[1].isalpha()), (_NO_TOKEN, ""))
        return self._anchor

    def _context(self, prompt: bytes) -> list[int]:
        """Return the last tokens of a prompt that show, with all of a run of bytes it ends in."""
        found: list[int] = []
        for token in memoryview(prompt).cast("I")[: -_CONTEXT_SEARCH_MAX - 1 : -1]:
            if token in self._special or self._tokenizer.id_to_token(token) is None:
                continue
            if len(found) >= _CONTEXT_TOKENS and not all(one in self._lone_bytes for one in found):
                break
            found.append(token)
        return found[::-1]

    def _open_bytes(self, prompt: bytes) -> bytes:
        """Return the bytes at a prompt's end that begin a character; only prompts given as tokens can end so."""
        tokens = memoryview(prompt).cast("I")
        if not tokens or self.token_text(tokens[-1]):
            return b""
        decoder = _Utf8Decoder(errors="replace")
        decoder.decode(b"".join(map(self.token_bytes, self._context(prompt))))
        return decoder.getstate()[0]


class _ByteLevelDetokeniser:
    """For vocabularies of bytes: looks up and joins."""

    __slots__ = ("_bytes_of", "_decoder", "_kept", "_owed", "_text_of")

    def __init__(self, text_of: Callable[[int], str | None], bytes_of: Callable[[int], bytes], open_bytes: bytes) -> None:
        self._text_of = text_of
        self._bytes_of = bytes_of
        self._decoder = _Utf8Decoder(errors="replace")
        self._decoder.decode(open_bytes)
        self._kept = bool(open_bytes)
        #: What the prompt shows of bytes that begin a character, while they may turn out to begin none.
        self._owed = open_bytes.decode(errors="replace")

    @property
    def kept_chars(self) -> int:
        return 0

    def add(self, token: int) -> str:
        text = self._text_of(token)
        if not self._kept and text is not None:
            return text
        if text == "":
            return ""
        data = self._bytes_of(token) if text is None else text.encode()
        text = self._decoder.decode(data)
        self._kept = self._decoder.getstate()[0] != b""
        return self._own(text)

    def finish(self) -> str:
        return self._own(self._decoder.decode(b"", True))

    def _own(self, text: str) -> str:
        """Return the answer's part of a text."""
        if self._owed and text:
            text, self._owed = text.removeprefix(self._owed), ""
        return text


class _WindowDetokeniser:
    """For all other decoders: decodes the newest tokens after those before them, and takes what they add."""

    __slots__ = ("_alone", "_before", "_context", "_fresh", "_hidden", "_last", "_lone_bytes", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        hidden: Collection[int],
        last: int,
        lone_bytes: Mapping[int, int],
        alone: dict[int, str],
        context: Sequence[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._last = last
        self._lone_bytes = lone_bytes
        self._alone = alone
        #: Tokens whose text is out or the prompt's, and that text.
        self._context = list(context)
        self._before = self._decode(self._context)
        #: Tokens whose text is not out yet.
        self._fresh: list[int] = []

    @property
    def kept_chars(self) -> int:
        data = bytes(self._lone_bytes[token] for token in self._fresh if token in self._lone_bytes)
        return len(data.decode(errors="ignore"))

    def add(self, token: int) -> str:
        if token in self._hidden or token > self._last:
            return ""
        self._fresh.append(token)
        if token in self._lone_bytes:
            # One byte that fits no character spoils all of its run, so none of it is certain before the run ends.
            return ""
        text = self._decode([*self._context, *self._fresh])
        added = _added(self._before, text)
        if not added or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._fresh = self._fresh, []
        self._before = self._decode(self._context) if len(self._context) > 1 else self._say_alone(token)
        return added

    def finish(self) -> str:
        return _added(self._before, self._decode([*self._context, *self._fresh]))

    def _say_alone(self, token: int) -> str:
        said = self._alone.get(token)
        if said is None:
            said = self._alone[token] = self._decode([token])
        return said

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def _added(before: str, text: str) -> str:
    """Return what `text` has beyond `before`; a prompt's last characters may have changed with what follows them."""
    if text.startswith(before):
        return text[len(before) :]
    pairs = zip(before, text, strict=False)
    return text[next((place for place, (old, new) in enumerate(pairs) if old != new), min(len(before), len(text))) :]
