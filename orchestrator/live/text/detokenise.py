"""From tokens back to text, one token at a time: whole characters only, and stop strings cut out.

Joined, the pieces are exactly what decoding all tokens at once gives.
"""

from codecs import getincrementaldecoder
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, cast

from tokenizers import Tokenizer

_Utf8Decoder = getincrementaldecoder("utf-8")
_REPLACEMENT = "\ufffd"


class Detokeniser(Protocol):
    """Turns one generation's tokens into text."""

    def add(self, token: int) -> str:
        """Return the text that is certain now: empty while a character is incomplete or for a hidden token."""
        ...

    def finish(self) -> str:
        """Return what was still held back; nothing is added afterwards."""
        ...


class Vocabulary:
    """Every token's text, and detokenisers over it.

    Args:
        tokenizer: the model's.
        description: its tokenizer.json.
        kept: special tokens that show in the text all the same, because something reads them there.
    """

    def __init__(self, tokenizer: Tokenizer, description: Mapping[str, Any], kept: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = cast(list[dict[str, Any]], description.get("added_tokens") or [])
        self._hidden = frozenset(cast(int, token["id"]) for token in added if token["special"] and token["content"] not in kept)
        self._byte_level = _is_byte_level(description.get("decoder"))
        names = () if self._byte_level else (f"<0x{byte:02X}>" for byte in range(256))
        #: Tokens of vocabularies with byte fallback that stand for a byte: a run of them is decoded as one.
        self._lone_bytes = frozenset(token for name in names if (token := tokenizer.token_to_id(name)) is not None)
        #: Filled as tokens are seen, so bounded by the vocabulary. None: the bytes are no whole characters.
        self._texts: dict[int, str | None] = {}
        self._bytes: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        """Token ids are below this."""
        return self._tokenizer.get_vocab_size()

    def detokeniser(self) -> Detokeniser:
        """Return one for a new generation."""
        if self._byte_level:
            return _ByteLevelDetokeniser(self)
        return _WindowDetokeniser(self._tokenizer, self._hidden, self._lone_bytes)

    def token_bytes(self, token: int) -> bytes:
        """Return a token's own bytes, special tokens' names included (for log probabilities)."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._make_bytes(token)
        return found

    def token_text(self, token: int) -> str | None:
        """Return what a token adds to the text: nothing for a hidden one; None if its bytes need their neighbours'."""
        try:
            return self._texts[token]
        except KeyError:
            pass
        text: str | None = ""
        if token not in self._hidden:
            try:
                text = self.token_bytes(token).decode()
            except UnicodeDecodeError:
                text = None
        self._texts[token] = text
        return text

    def _make_bytes(self, token: int) -> bytes:
        content = self._tokenizer.id_to_token(token)
        if content is None:
            return b""
        if not self._byte_level:
            return self._tokenizer.decode([token], skip_special_tokens=False).encode()
        try:
            return bytes([_BYTE_OF[character] for character in content])
        except KeyError:
            # An added token written as it is; the decoder leaves such ones alone.
            return content.encode()


class _ByteLevelDetokeniser:
    """For vocabularies of bytes: looks up and joins."""

    __slots__ = ("_decoder", "_held", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = _Utf8Decoder(errors="replace")
        self._held = False

    def add(self, token: int) -> str:
        text = self._vocabulary.token_text(token)
        if not self._held and text is not None:
            return text
        if text == "":
            return ""
        text = self._decoder.decode(self._vocabulary.token_bytes(token))
        self._held = self._decoder.getstate()[0] != b""
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _WindowDetokeniser:
    """For all other decoders: decodes a sliding window twice and takes the difference."""

    __slots__ = ("_hidden", "_lone_bytes", "_read", "_start", "_tokenizer", "_tokens")

    def __init__(self, tokenizer: Tokenizer, hidden: Collection[int], lone_bytes: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._lone_bytes = lone_bytes
        self._tokens: list[int] = []
        #: tokens[start:read] are the context of tokens[read:], whose text is not out yet.
        self._start = 0
        self._read = 0

    def add(self, token: int) -> str:
        if token in self._hidden:
            return ""
        self._tokens.append(token)
        if token in self._lone_bytes:
            return ""
        before, text = self._window()
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def finish(self) -> str:
        before, text = self._window()
        return text[len(before) :]

    def _window(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        before = decode(self._tokens[self._start : self._read], skip_special_tokens=False)
        return before, decode(self._tokens[self._start :], skip_special_tokens=False)


class StopStrings:
    """Cuts a text at the first of some strings, holding back what may become one."""

    __slots__ = ("_held", "_strings", "found")

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held: str = ""
        #: True once a stop string came; everything added later is dropped.
        self.found = False

    def add(self, text: str) -> str:
        """Return the text that is certainly outside any stop string."""
        if self.found:
            return ""
        text = self._held + text
        places = [(place + len(string), place) for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            # The one that is complete first wins, so that it does not matter how the text was cut into pieces.
            self.found = True
            self._held = ""
            return text[: min(places)[1]]
        held = max(partial_match(text, string) for string in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def partial_match(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that begins `string` without being all of it."""
    first = string[0]
    place = text.find(first, max(0, len(text) - len(string) + 1))
    while place >= 0:
        if string.startswith(text[place:]):
            return len(text) - place
        place = text.find(first, place + 1)
    return 0


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    match decoder:
        case {"type": "ByteLevel"}:
            return True
        case {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}:
            return True
        case _:
            return False


def _byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_of()
