"""Finds where the calls in an answer are: text around them streams on as content, and readers read them.

    content  open tag  calls  close tags  content ...

White space next to a call belongs to it, and so do tags. What looked like a call and is none comes out as content, letter for
letter.
"""

import re
from collections.abc import Callable, Collection, Sequence

from orchestrator.live.text.stops import partial_match
from orchestrator.live.text.tools import AnswerPart, CallReader

#: What was read in vain is looked through for another call if it is no longer: so much is read twice at most for each tag.
_AGAIN_MAX = 1024


class CallFinder:
    """Splits one generation into content and calls.

    Args:
        read: returns what reads calls after a tag.
        opens: tags that calls may begin with.
        closes: tags, and closing brackets, that may follow calls.
        parts: tags that belong to what is read.
        lines: characters that calls may begin with at the beginning of a line, and that belong to what is read.
        silent: tags that never show, even if no call follows them.
    """

    __slots__ = (
        "_begun", "_called", "_closes", "_first", "_kept", "_later", "_opens", "_parts", "_raw", "_read", "_reader", "_silent",
        "_space", "_tag",
    )  # fmt: skip

    def __init__(
        self,
        read: Callable[[str], CallReader],
        opens: Sequence[str],
        closes: Sequence[str] = (),
        parts: Collection[str] = (),
        lines: str = "",
        silent: Collection[str] = (),
    ) -> None:
        self._read = read
        self._opens = opens
        self._closes = closes
        self._parts = parts
        self._first = re.compile(rf"\s*([{re.escape(lines)}])") if lines else None
        self._later = re.compile(rf"\n[ \t]*([{re.escape(lines)}])") if lines else None
        self._silent = silent
        #: Text that is not certain yet: what may become a tag, and white space that may belong to a call.
        self._kept = ""
        self._reader: CallReader | None = None
        #: What is read, until a call comes of it: the white space before, the tag, and the text after.
        self._space = ""
        self._tag = ""
        self._raw: list[str] = []
        #: The last that came out was a call.
        self._called = False
        #: Some of a line has come out.
        self._begun = False

    @property
    def calling(self) -> bool:
        """The arguments of a call are being written."""
        return self._reader is not None and self._reader.calling

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now."""
        self._kept += text
        parts: list[AnswerPart] = []
        while self._go_on(parts) if self._reader is not None else self._open(parts):
            pass
        return parts

    def finish(self, cut: bool = False) -> list[AnswerPart]:
        """Return what was still kept back."""
        parts: list[AnswerPart] = []
        if self._reader is not None:
            parts += self._reader.finish(cut)
            if not self._reader.told:
                return [*parts, *_content(self._shown(self._space + self._tag + "".join(self._raw)))]
            self._kept, self._called = self._reader.rest, True
        self._drop_closes()
        kept, self._kept = self._kept, ""
        return parts if self._called and not kept.strip() else [*parts, *_content(kept)]

    # --- outside calls ------------------------------------------------------------------------------------------------

    def _open(self, parts: list[AnswerPart]) -> bool:
        """Pass content on up to where a call may begin; True if there is more to do."""
        if self._called:
            self._drop_closes()
            start = self._kept.lstrip()
            if not start or any(tag.startswith(start) for tag in self._closes):
                return False
        found, tag = self._find()
        if tag:
            before, self._kept = self._kept[:found], self._kept[found + len(tag) :]
            content = before.rstrip()
            self._space = before[len(content) :]
            self._begin(tag)
        else:
            kept = max(partial_match(self._kept, tag) for tag in self._opens) if self._opens else 0
            content = self._kept[: len(self._kept) - kept].rstrip()
            self._kept = self._kept[len(content) :]
        self._say(content, parts)
        return bool(tag)

    def _drop_closes(self) -> None:
        """Take tags and brackets that close what was read off what follows it."""
        if not self._called:
            return
        dropped = True
        while dropped:
            start = self._kept.lstrip()
            dropped = next((tag for tag in self._closes if start.startswith(tag)), "")
            if dropped:
                self._kept = start[len(dropped) :]

    def _find(self) -> tuple[int, str]:
        """Return where the first tag is, and which; an empty one for none."""
        places = [(place, tag) for tag in self._opens if (place := self._kept.find(tag)) >= 0]
        if self._first is not None and self._later is not None:
            found = self._first.match(self._kept) if self._called or not self._begun else None
            found = found or self._later.search(self._kept)
            places += [(found.start(1), found.group(1))] if found is not None else []
        return min(places, default=(0, ""))

    def _begin(self, tag: str) -> None:
        self._reader, self._tag = self._read(tag), tag
        self._raw.clear()
        if tag in self._parts or len(tag) == 1:
            self._kept, self._tag = tag + self._kept, ""

    def _say(self, content: str, parts: list[AnswerPart]) -> None:
        if content:
            parts.append(content)
            self._called, self._begun = False, True

    # --- inside -------------------------------------------------------------------------------------------------------

    def _shown(self, text: str) -> str:
        for tag in self._silent:
            text = text.replace(tag, "")
        return text

    def _go_on(self, parts: list[AnswerPart]) -> bool:
        """Let the reader read on; True if it is over."""
        reader, text = self._reader, self._kept
        assert reader is not None
        self._kept = ""
        if not reader.told:
            self._raw.append(text)
        parts += reader.add(text)
        if reader.told:
            self._raw.clear()
            self._space = ""
        if not reader.over:
            return False
        self._reader = None
        if reader.told:
            self._kept, self._called = reader.rest, True
        else:
            self._take_back(len(reader.rest), parts)
        return True

    def _take_back(self, unread_chars: int, parts: list[AnswerPart]) -> None:
        """Let what is no call be content."""
        raw = "".join(self._raw)
        self._raw.clear()
        read = len(raw) - unread_chars
        if read <= _AGAIN_MAX:
            read = 0 if self._tag else 1
        self._kept = raw[read:]
        self._say(self._shown(self._space + self._tag + raw[:read]), parts)


def _content(text: str) -> list[AnswerPart]:
    return [text] if text else []
