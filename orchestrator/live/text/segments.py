"""Where a text may be cut so that its parts tokenise to exactly the whole's tokens: what makes a long prompt cheap to extend.

Rules for editors. A cut is only made where the following holds whatever the text before and after it is; anything that is not
listed here is not cut, which costs time and never exactness.

Rule 1, at a special token. A tokenizer finds its added tokens first, leftmost and longest, and handles what lies between them
apart. Where an added token starts, the search starts anew, so both sides are independent. Left out are tokens that look at
their surroundings: matched after normalisation, matched as whole words only, or swallowing white space to their left.

Rule 2, inside text. For the pre-tokenizers listed below, no pre-token has a letter followed by a space in it, none looks behind
itself, and look-ahead goes no further than one character past a run of white space. So between a lower-case ASCII letter and a
space that is followed by an ASCII letter there always is a pre-token boundary; the model works inside pre-tokens only.
Normalisation to NFC never joins ASCII characters to what precedes them.

Both depend on a few characters behind the cut, `margin` at most: a cut found in one text holds in every other that agrees with
it up to `margin` characters past the cut.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

#: Cuts are at least this many characters apart: each costs a call, and a turn re-tokenises at most about two of them.
SPACING_CHARS = 256
#: Text without special tokens is cut about every so many characters.
STRETCH_CHARS = 2048

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
#: Split patterns for which rule 2 was checked.
_KNOWN_PATTERNS = frozenset(
    {
        # GPT-2
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,
        # Qwen 2, 2.5 and 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,
        # GPT-4o, gpt-oss
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES,
        # DeepSeek V3
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        + _SPACES,
    }
)
_TEXT_CUT = re.compile("[a-z] [A-Za-z]")
_NOTHING = re.compile("(?!)")


class Segmenter:
    """Finds cuts for one tokenizer, described by its tokenizer.json."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        added = cast(list[dict[str, Any]], description.get("added_tokens") or [])
        contents = [cast(str, token["content"]) for token in added]
        #: Characters behind a cut that it depends on.
        self.margin = max([len(content) for content in contents], default=0) + 2
        normalizer = cast("dict[str, Any] | None", description.get("normalizer"))
        first_pass = sorted((token["content"] for token in added if not token["normalized"]), key=lambda text: (-len(text), text))
        self._added = re.compile("|".join(map(re.escape, first_pass))) if first_pass else _NOTHING
        self._clean = frozenset(token["content"] for token in added if _is_clean(token))
        known = _known_pre_tokenizer(description.get("pre_tokenizer")) and _keeps_ascii(normalizer)
        harmless = all(_is_harmless(token, normalizer is not None) for token in added)
        self._cuts_text = known and harmless

    def cuts(self, text: str, start: int) -> list[int]:
        """Return positions in `text` after `start` (itself a cut, or 0) where it may be cut, ascending."""
        found: list[int] = []
        last = start
        for match in self._added.finditer(text, start):
            position = match.start()
            if match.group() in self._clean and position - last >= SPACING_CHARS:
                if self._cuts_text:
                    self._stretch(text, last, position, found)
                found.append(position)
                last = position
        if self._cuts_text:
            self._stretch(text, last, len(text), found)
        return found

    @staticmethod
    def _stretch(text: str, start: int, end: int, found: list[int]) -> None:
        """Add cuts inside a long run of text."""
        while end - start > STRETCH_CHARS + SPACING_CHARS:
            match = _TEXT_CUT.search(text, start + STRETCH_CHARS, end)
            if match is None:
                return
            start = match.start() + 1
            found.append(start)


def _is_clean(token: Mapping[str, Any]) -> bool:
    """Rule 1: the token's start is found without looking at its surroundings."""
    content = cast(str, token["content"])
    edges = bool(content) and not content[0].isspace() and not content[-1].isspace() and not content[0].isalnum()
    return edges and not (token["normalized"] or token["lstrip"] or token["single_word"])


def _is_harmless(token: Mapping[str, Any], normalizes: bool) -> bool:
    """Rule 2: the token can neither cover a cut inside text nor swallow the space after it."""
    spaced = any(character.isspace() for character in cast(str, token["content"]))
    aware = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not (spaced or aware or (normalizes and token["normalized"]))


def _keeps_ascii(normalizer: Mapping[str, Any] | None) -> bool:
    return normalizer is None or normalizer["type"] == "NFC"


def _known_pre_tokenizer(description: Mapping[str, Any] | None) -> bool:
    match description:
        case {"type": "Sequence", "pretokenizers": stages}:
            return bool(stages) and all(_known_pre_tokenizer(stage) for stage in cast(list[dict[str, Any]], stages))
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern in _KNOWN_PATTERNS
        case {"type": "ByteLevel"}:
            return True
        case _:
            return False
