"""Puts messages of content blocks together as chat templates read them, and keeps what is to be cached up to where.

Anthropic                                        templates
system                                           a first message with role system
user       text, document, search_result         one user message; neighbours of one role become one
           tool_result                           a message with role tool
assistant  text, thinking, tool_use              one message with content, thoughts and calls
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.live.asked import Breakpoint
from orchestrator.live.http.anthropic.bodies import Block, Message, Tool
from orchestrator.live.http.anthropic.signatures import thoughts_in
from orchestrator.live.http.anthropic.unserved import check_tool
from orchestrator.live.http.retention import marked_s
from orchestrator.live.refusals import Invalid, require
from orchestrator.live.text.conversations import shown_call, shown_message, shown_tools, without_billing

_ROLES = ("user", "assistant", "system")
#: What stands between two blocks of text; an assistant's go on where the one before ended.
_BETWEEN = {"user": "\n", "system": "\n", "tool": "\n", "assistant": ""}


@dataclass(slots=True)
class _Draft:
    """A message as it grows."""

    role: str
    tool_call_id: str | None = None
    content: str = ""
    #: Whether any text has come, be it empty.
    begun: bool = False
    thoughts: list[str] = field(default_factory=lambda: [])
    calls: list[dict[str, Any]] = field(default_factory=lambda: [])

    def add(self, text: str) -> None:
        self.content += _BETWEEN[self.role] + text if self.begun else text
        self.begun = True

    def shown(self) -> dict[str, Any]:
        thoughts = "\n\n".join(self.thoughts) if self.thoughts else None
        return shown_message(self.role, self.content, None, self.calls, self.tool_call_id, thoughts)


class Drafts:
    """A conversation that is being put together: tools first, then the system prompt, then messages, as they are cached."""

    def __init__(self) -> None:
        self._drafts: list[_Draft] = []
        self.tools: list[dict[str, Any]] = []
        #: In order.
        self.breakpoints: list[Breakpoint] = []

    @property
    def last(self) -> _Draft | None:
        """The message that grows."""
        return self._drafts[-1] if self._drafts else None

    def shown(self) -> list[dict[str, Any]]:
        """Return the messages as templates read them."""
        return [draft.shown() for draft in self._drafts]

    def mark_end(self, marker: Any) -> None:
        """Note a marker behind all that has come."""
        if (seconds := marked_s(marker)) and self._drafts:
            self._mark(seconds)

    def add_tools(self, tools: Sequence[Tool]) -> None:
        """Take tools. Raises `Invalid`."""
        for place, tool in enumerate(tools):
            where = f"tools.{place}"
            check_tool(tool, where)
            require(bool(tool.name), f"{where}.name", "must be a name")
            require(tool.input_schema is not None, f"{where}.input_schema", "must be an object, a JSON schema")
            described = {"description": tool.description} if tool.description is not None else {}
            function: dict[str, Any] = {"name": tool.name, **described, "parameters": tool.input_schema}
            if tool.strict:
                function["strict"] = True
            self.tools += shown_tools([{"type": "function", "function": function}]) or ()
            if seconds := marked_s(tool.cache_control):
                self.breakpoints.append(Breakpoint(seconds, place))

    def add_system(self, system: str | Sequence[Block]) -> None:
        """Take the system prompt; billing lines are no part of it. Raises `Invalid`."""
        blocks = [Block("text", system)] if isinstance(system, str) else system
        for place, block in enumerate(blocks):
            require(block.type == "text", f"system.{place}", f"blocks of type {block.type!r} cannot be system prompts")
            if text := without_billing(block.text or ""):
                self._of("system").add(text)
            self.mark_end(block.cache_control)

    def add(self, message: Message, where: str) -> None:
        """Take a message. Raises `Invalid`."""
        require(message.role in _ROLES, f"{where}.role", f"must be user, assistant or system, is {message.role!r}")
        blocks = [Block("text", message.content)] if isinstance(message.content, str) else message.content
        for place, block in enumerate(blocks):
            self._add_block(message.role, block, f"{where}.content.{place}")

    def _add_block(self, role: str, block: Block, where: str) -> None:
        match role, block.type:
            case _, "text":
                self._of(role).add(block.text or "")
            case "user", "tool_result":
                self._add_result(block, where)
                return
            case "user", "document" | "search_result":
                self._of(role).add(_told(block, where))
            case "assistant", "thinking":
                self._of(role).thoughts.append(block.thinking or thoughts_in(block.signature or ""))
                return
            case "assistant", "redacted_thinking":
                self._of(role)
                return
            case "assistant", "tool_use":
                self._add_call(block, where)
                return
            case _:
                raise Invalid(f"{where}: blocks of type {block.type!r} are not served here", "invalid_value", where)
        self.mark_end(block.cache_control)

    def _add_result(self, block: Block, where: str) -> None:
        require(bool(block.tool_use_id), f"{where}.tool_use_id", "must be the id of a tool_use block")
        draft = _Draft("tool", block.tool_use_id)
        self._drafts.append(draft)
        parts = [Block("text", block.content)] if isinstance(block.content, str) else block.content or ()
        require(not isinstance(parts, dict), f"{where}.content", "must be a text or a list of blocks")
        for place, part in enumerate(cast("Sequence[Block]", parts)):
            text = _told(part, f"{where}.content.{place}")
            draft.add(f"Error: {text}" if block.is_error and not place and not text.lower().startswith("error") else text)
            self.mark_end(part.cache_control)
        self.mark_end(block.cache_control)

    def _add_call(self, block: Block, where: str) -> None:
        require(bool(block.name), f"{where}.name", "must be a tool's name")
        require(isinstance(block.input, dict), f"{where}.input", "must be an object")
        self._of("assistant").calls.append(shown_call(block.name or "", block.input, block.id, "function"))
        if seconds := marked_s(block.cache_control):
            # Calls come after all content, so that it is where the next message begins.
            self.breakpoints.append(Breakpoint(seconds, len(self._drafts), 0))

    def _of(self, role: str) -> _Draft:
        """Return the message of that role that goes on, or begin one."""
        if not self._drafts or self._drafts[-1].role != role:
            self._drafts.append(_Draft(role))
        return self._drafts[-1]

    def _mark(self, seconds: float) -> None:
        self.breakpoints.append(Breakpoint(seconds, len(self._drafts) - 1, len(self._drafts[-1].content)))


def _told(block: Block, where: str) -> str:
    """Return a block as text. Raises `Invalid` for one that is none."""
    source: Any = block.source
    given = cast("dict[str, Any]", source) if isinstance(source, dict) else {}
    match block.type:
        case "text":
            return block.text or ""
        case "tool_reference" if block.tool_name:  # deferred tools are among the others from the start
            return f"The tool {block.tool_name} can be called."
        case "document" if given.get("type") == "text" and not _cited(block):
            return "\n".join(part for part in (block.title, block.context, str(given.get("data", ""))) if part)
        case "search_result" if isinstance(block.content, list) and not _cited(block):
            texts = [_told(part, f"{where}.content.{place}") for place, part in enumerate(block.content)]
            return "\n".join(part for part in (block.title, source if isinstance(source, str) else "", *texts) if part)
        case "document" | "search_result" if _cited(block):
            raise Invalid(f"{where}.citations: citations are not served here", "invalid_value", f"{where}.citations")
        case "document":
            kind = given.get("type")
            raise Invalid(f"{where}.source: documents of type {kind!r} are not served here", "invalid_value", f"{where}.source")
        case _:
            raise Invalid(f"{where}: blocks of type {block.type!r} are not served here", "invalid_value", where)


def _cited(block: Block) -> bool:
    citations: Any = block.citations
    return isinstance(citations, dict) and bool(cast("dict[str, Any]", citations).get("enabled"))
