"""Reads a JSON value that a model still writes: what comes out is valid JSON once it ends, as it was written where it can be.

Models leave JSON's straight way in some places, and what was sent of a value cannot be taken back. So every text has a reading:

    line ends and other control characters in strings       escaped
    a quote in a string that nothing follows as after one   part of the string, escaped (`"say "yes" to"`)
    an escape that is none                                  its backslash is a backslash
    a comma too many, a comma, colon or value too few       left out, put in, null
    True, False, None                                       true, false, null
    anything else that is no value or name                  a string of its text
    what is open where the value must end                   closed

Valid JSON is never changed. Objects and lists end themselves; a tag that ends the call they belong to ends them too, outside
strings.
"""

import json
import re
from collections.abc import Sequence
from enum import Enum, auto

_SPACE = " \t\n\r"
_SPACES = re.compile(f"[{_SPACE}]*")
#: White space looked through for what follows a quote: more than anybody indents.
_AHEAD_MAX = 256
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SHORT_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.ASCII)
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_CLOSERS = {"{": "}", "[": "]"}


class _At(Enum):
    """What comes next."""

    VALUE = auto()
    NAME = auto()  # of an object's member
    COLON = auto()
    AFTER = auto()  # a comma, or the end of the object or list
    STRING = auto()
    BARE = auto()  # in a value or name without quotes


class ValueReader:
    """Reads one value.

    Args:
        ends: tags that end it wherever they stand outside strings.
    """

    __slots__ = (
        "_at",
        "_bare",
        "_comma",
        "_ends",
        "_kept",
        "_naming",
        "_open",
        "_over",
        "_stack",
        "_starts",
        "done",
        "guessed",
        "rest",
    )

    def __init__(self, ends: Sequence[str] = ()) -> None:
        self._ends = tuple(ends)
        #: What begins a tag that may end it.
        self._starts = frozenset(end[0] for end in ends)
        self._at = _At.VALUE
        #: The objects and lists it is in, by what opened them.
        self._stack: list[str] = []
        #: How many of each closer they need.
        self._open = {"}": 0, "]": 0}
        #: The string or bare text that is being read is a member's name.
        self._naming = False
        #: A comma, with the white space after it, that is one too many if the object or list ends.
        self._comma = ""
        self._bare: list[str] = []
        #: Text that needs more of it to be read.
        self._kept: str = ""
        self._over = False
        self.done = False
        #: Something was put in, or taken for a string, that is not there.
        self.guessed = False
        #: What follows the value once it is done.
        self.rest: str = ""

    def add(self, text: str) -> str:
        """Take more text; return what is certain now of the value."""
        text, self._kept = self._kept + text, ""
        out: list[str] = []
        place = 0
        while place < len(text) and not self.done:
            after = self._step(text, place, out)
            if after is None:
                self._kept = text[place:]
                break
            place = after
        if self.done:
            self.rest = text[place:]
        return "".join(out)

    def finish(self, cut: bool = False) -> str:
        """Return how the value ends though its text does not; `cut`: nothing is made up, what was kept back comes as it is."""
        if cut:
            return "".join((self._comma, *self._bare, self._kept))
        self._over = True
        out = [self.add("")]
        if not self.done:
            self._close(out)
        return "".join(out)

    # --- steps: each returns the place after what it read, or None where more text must decide ------------------------

    def _step(self, text: str, place: int, out: list[str]) -> int | None:
        if self._at is _At.STRING:
            return self._string(text, place, out)
        if self._at is _At.BARE:
            return self._bare_text(text, place, out)
        spaces = _SPACES.match(text, place)
        assert spaces is not None
        if spaces.end() > place:
            self._space(spaces.group(), out)
            return spaces.end()
        ends = self._ends_at(text, place)
        if ends is None:
            return None
        if ends:
            self._close(out)
            return place
        match self._at:
            case _At.COLON:
                return self._colon(text[place], place, out)
            case _At.AFTER:
                return self._after(text[place], place, out)
            case _:
                return self._begin(text[place], place, out)

    def _space(self, spaces: str, out: list[str]) -> None:
        if self._comma:
            self._comma += spaces
        else:
            out.append(spaces)

    def _begin(self, first: str, place: int, out: list[str]) -> int:
        """Begin a value or a member's name, or end what it would have been in."""
        naming, inside = self._at is _At.NAME, self._stack[-1] if self._stack else ""
        if first == "," and inside and (naming or inside == "["):
            self.guessed = True
            return place + 1
        if first == "," or (self._open.get(first) and (first == "}" or not naming)):
            if inside == "{" and not naming:
                out.append("null")
                self.guessed = True
            else:
                self._drop_comma(out)
            self._at = _At.AFTER
            return place
        self._take_comma(out)
        self._naming = naming
        if first == '"':
            out.append(first)
            self._at = _At.STRING
        elif first in "{[" and not naming:
            out.append(first)
            self._stack.append(first)
            self._open[_CLOSERS[first]] += 1
            self._at = _At.NAME if first == "{" else _At.VALUE
        else:
            self._at = _At.BARE
            return place
        return place + 1

    def _colon(self, first: str, place: int, out: list[str]) -> int:
        if first == ":":
            self._at = _At.VALUE
            out.append(first)
            return place + 1
        self.guessed = True
        out.append(": ")
        self._at = _At.VALUE
        return place

    def _after(self, first: str, place: int, out: list[str]) -> int:
        """Go on after a member or an element."""
        inside = self._stack[-1]
        if first == ",":
            self._comma = first
            self._at = _At.NAME if inside == "{" else _At.VALUE
            return place + 1
        if first == _CLOSERS[inside]:
            self._end_one(out)
            return place + 1
        self.guessed = True
        if self._open.get(first):
            # What it closes is further out.
            self._end_one(out)
        else:
            self._comma = ", "
            self._at = _At.NAME if inside == "{" else _At.VALUE
        return place

    def _string(self, text: str, place: int, out: list[str]) -> int | None:
        plain = _PLAIN.match(text, place)
        if plain is not None:
            out.append(plain.group())
            return plain.end()
        first = text[place]
        if first == "\\":
            return self._escape(text, place, out)
        if first != '"':
            out.append(json.dumps(first)[1:-1])
            return place + 1
        closes = self._closes(text, place + 1)
        if closes is None:
            return None
        out.append(first if closes else '\\"')
        if closes:
            self._end_scalar()
        return place + 1

    def _escape(self, text: str, place: int, out: list[str]) -> int | None:
        """Read an escape; the backslash of one that JSON has not is doubled."""
        follows = text[place + 1 : place + 6]
        if follows[:1] in _SHORT_ESCAPES:
            length = 2
        elif follows[:1] == "u" and _HEX.issuperset(follows[1:]) and len(follows) == 5:
            length = 6
        elif not self._over and (not follows or (follows[0] == "u" and _HEX.issuperset(follows[1:]) and len(follows) < 5)):
            return None
        else:
            # Python's way to write an apostrophe.
            out.append("" if follows[:1] == "'" else "\\\\")
            return place + 1
        out.append(text[place : place + length])
        return place + length

    def _closes(self, text: str, place: int) -> bool | None:
        """Tell whether a quote before a place ends its string: if what may follow one there follows."""
        if not self._stack:
            return True
        found = self._look(text, place)
        if found is None or not (follows := text[found : found + 1]):
            return None if found is None else True
        if self._naming:
            return follows in ":,}"
        if follows == "," and self._stack[-1] == "{":
            found = self._look(text, found + 1)
            return None if found is None else text[found : found + 1] in ('"', "}", "")
        return follows == "," or bool(self._open.get(follows))

    def _look(self, text: str, place: int) -> int | None:
        """Return where the next character after white space is, the text's end if the value ends before; None: not known yet."""
        spaces = _SPACES.match(text, place, place + _AHEAD_MAX)
        assert spaces is not None
        found = spaces.end()
        if found == place + _AHEAD_MAX:
            return len(text)
        if found == len(text):
            return found if self._over else None
        ends = self._ends_at(text, found)
        return None if ends is None else len(text) if ends else found

    def _bare_text(self, text: str, place: int, out: list[str]) -> int | None:
        """Read on in a value or name without quotes, up to what may follow one."""
        stops = ":,}" if self._naming else ",}]" if self._stack else ""
        stops = [one for one in stops if self._open.get(one, 1)]
        found = place
        while found < len(text) and text[found] not in stops:
            ends = self._ends_at(text, found)
            if ends is not False:
                break
            found += 1
        self._bare.append(text[place:found])
        if found == len(text):
            return found
        if self._ends_at(text, found) is None:
            return None if found == place else found
        self._end_bare(out)
        return found

    def _ends_at(self, text: str, place: int) -> bool | None:
        """Tell whether a tag at a place ends the value; None if more text must tell."""
        if text[place] not in self._starts:
            return False
        if any(text.startswith(end, place) for end in self._ends):
            return True
        begun = not self._over and any(len(text) - place < len(end) and end.startswith(text[place:]) for end in self._ends)
        return None if begun else False

    # --- ends -------------------------------------------------------------------------------------------------------

    def _end_scalar(self) -> None:
        self._at = _At.COLON if self._naming else _At.AFTER
        self.done = not self._stack

    def _end_bare(self, out: list[str]) -> None:
        written = "".join(self._bare)
        self._bare = []
        text = written.rstrip(_SPACE)
        known = None if self._naming else text if _SCALAR.fullmatch(text) else _PYTHON.get(text)
        self.guessed = self.guessed or known is None
        out.append((json.dumps(text, ensure_ascii=False) if known is None else known) + written[len(text) :])
        self._end_scalar()

    def _end_one(self, out: list[str]) -> None:
        closer = _CLOSERS[self._stack.pop()]
        self._open[closer] -= 1
        out.append(closer)
        self._at = _At.AFTER
        self.done = not self._stack

    def _take_comma(self, out: list[str]) -> None:
        out.append(self._comma)
        self._comma = ""

    def _drop_comma(self, out: list[str]) -> None:
        out.append(self._comma[1:])
        self._comma = ""

    def _close(self, out: list[str]) -> None:
        """Close all that is open."""
        self.guessed = True
        if self._at is _At.STRING:
            out.append('"')
            self._end_scalar()
        elif self._at is _At.BARE:
            self._end_bare(out)
        self._drop_comma(out)
        if self._at is _At.COLON:
            out.append(": null")
        elif self._at is _At.VALUE and (not self._stack or self._stack[-1] == "{"):
            out.append("null")
        out += [_CLOSERS[one] for one in reversed(self._stack)]
        self._stack.clear()
        self.done = True
