"""Stop strings: cut out of a text that still comes in, however it is cut into pieces."""

from collections.abc import Sequence


class StopStrings:
    """Cuts a text at the first of some strings, holding back what may become one.

    Args:
        strings: none of them empty.
        included: the cut is behind the string.
    """

    __slots__ = ("_included", "_kept", "_strings", "found")

    def __init__(self, strings: Sequence[str], included: bool = False) -> None:
        self._strings = strings
        self._included = included
        self._kept: str = ""
        #: The string that came, after which everything added is dropped; empty: none so far.
        self.found = ""

    def add(self, text: str, counts: bool = True) -> str:
        """Return the text that is certainly outside any stop string; one that ends in text that does not count is none."""
        if self.found:
            return ""
        text = self._kept + text
        found = [(text.find(string), string) for string in self._strings] if counts else []
        places = [(place + len(string), place, string) for place, string in found if place >= 0]
        if places:
            # The one that is complete first wins, so that it does not matter how the text was cut into pieces.
            end, start, self.found = min(places)
            self._kept = ""
            return text[: end if self._included else start]
        kept = max(partial_match(text, string) for string in self._strings)
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """Return what was kept back and became no stop string."""
        kept, self._kept = self._kept, ""
        return kept


def partial_match(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that begins `string` without being all of it."""
    first = string[0]
    place = text.find(first, max(0, len(text) - len(string) + 1))
    while place >= 0:
        if string.startswith(text[place:]):
            return len(text) - place
        place = text.find(first, place + 1)
    return 0
