"""Tools as the Responses API has them, made what chat templates read; and the names of calls, told back as the client has them.

    function     as it is                       custom       a function of one text, `input`, with what that must be said of it
    namespace    its tools, each called by namespace and name in one

Searches of the web, which OpenAI's servers would make themselves, are not made here: the model is not told of them, nor do an
answer's `tools` name them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.live.asked import Constraint, ConstraintKind, ToolUse
from orchestrator.live.refusals import Invalid, require

TOOLS_MAX = 4096
#: Between a namespace and a name in what the model sees: letters that every tool-call style takes.
_JOINT = "__"
#: What the model is told of a custom tool's input.
_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
#: What it is told of a form of that.
_FORMS = {ConstraintKind.GRAMMAR: "a grammar in Lark", ConstraintKind.REGEX: "a regular expression"}
#: Offered by agents whether or not they are needed; anything else that servers run is what a client counts on.
_LEFT_OUT = "web_search"


@dataclass(frozen=True, slots=True)
class Named:
    """A tool as the client has it."""

    name: str
    namespace: str | None = None
    #: It is called with a text, not with arguments.
    custom: bool = False
    #: Where the client wrote it.
    field: str = ""
    #: What that text must be; None: anything.
    input: Constraint | None = None

    @property
    def schema_field(self) -> str:
        """Where the client wrote what arguments are."""
        return self.input.field if self.input is not None else f"{self.field}.parameters"


@dataclass(frozen=True, slots=True)
class Offered:
    """The tools of a request."""

    #: As the client wrote them, without those that are left out.
    told: Sequence[Mapping[str, Any]] = ()
    #: As templates read them.
    shown: Sequence[Mapping[str, Any]] = ()
    #: What each is to the client, by the name that the model sees.
    names: Mapping[str, Named] = field(default_factory=lambda: {})

    def only(self, names: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """Return those of some names, as templates read them."""
        return [tool for tool in self.shown if tool["function"]["name"] in names]


def shown_name(namespace: Any, name: str) -> str:
    """Return what a model calls a function."""
    return f"{namespace}{_JOINT}{name}" if isinstance(namespace, str) and namespace else name


def offered(tools: Sequence[Mapping[str, Any]]) -> Offered:
    """Return what a request's tools are. Raises `Invalid` for those that are none, or not served."""
    told: list[Mapping[str, Any]] = []
    shown: list[Mapping[str, Any]] = []
    names: dict[str, Named] = {}
    for place, tool in enumerate(tools):
        where, kind = f"tools[{place}]", tool.get("type")
        match kind:
            case "function" | "custom":
                functions, namespace, about = {where: tool}, None, ""
            case "namespace":
                functions, namespace, about = _grouped(tool, where)
            case str() if kind.startswith(_LEFT_OUT):
                continue
            case _:
                problem = f"{where}: tools of type {kind!r} are not served; function, custom and namespace are"
                raise Invalid(problem, "unsupported_tool", where)
        told.append(tool)
        for spot, function in functions.items():
            one = _shown(function, namespace, about, spot)
            about = ""
            name = one["function"]["name"]
            require(name not in names, spot, f"two tools are called {name!r}")
            custom = function["type"] == "custom"
            names[name] = Named(str(function["name"]), namespace, custom, spot, _input(function, spot) if custom else None)
            shown.append(one)
    require(len(shown) <= TOOLS_MAX, "tools", f"must be at most {TOOLS_MAX} tools")
    return Offered(told, shown, names)


def _grouped(tool: Mapping[str, Any], where: str) -> tuple[dict[str, Mapping[str, Any]], str, str]:
    """Return a namespace's tools by where they are, its name, and what is said of it."""
    name, functions, about = tool.get("name"), tool.get("tools"), tool.get("description")
    require(isinstance(name, str) and bool(name), f"{where}.name", "must be a name")
    require(isinstance(functions, list), f"{where}.tools", "must be a list of functions")
    placed = {f"{where}.tools[{number}]": function for number, function in enumerate(cast("list[Any]", functions))}
    for spot, function in placed.items():
        kind = cast("dict[str, Any]", function).get("type") if isinstance(function, dict) else None
        known = kind in ("function", "custom")
        require(known, spot, f"tools of type {kind!r} are not served; function and custom are")
    return placed, cast(str, name), about if isinstance(about, str) else ""


def _shown(function: Mapping[str, Any], namespace: str | None, about: str, where: str) -> dict[str, Any]:
    """Return a tool as templates read it; what its namespace says of itself stands with its first."""
    name, description = function.get("name"), function.get("description")
    custom = function.get("type") == "custom"
    parameters = _INPUT if custom else function.get("parameters")
    require(isinstance(name, str) and bool(name), f"{where}.name", "must be a name")
    require(isinstance(parameters, dict | None), f"{where}.parameters", "must be an object, a JSON schema")
    require(isinstance(description, str | None), f"{where}.description", "must be text")
    shown: dict[str, Any] = {"name": shown_name(namespace, cast(str, name))}
    form = _input(function, where) if custom else None
    told = f"The input must be of this form, {_FORMS[form.kind]}:\n\n{form.text}" if form is not None else None
    if words := "\n\n".join(text for text in (about, description, told) if text):
        shown["description"] = words
    if parameters is not None:
        shown["parameters"] = parameters
    if function.get("strict"):
        shown["strict"] = True
    return {"type": "function", "function": shown}


def _input(tool: Mapping[str, Any], where: str) -> Constraint | None:
    """Return what the input of a custom tool must be, None if anything. Raises `Invalid`."""
    match tool.get("format"):
        case None | {"type": "text"}:
            return None
        case {"type": "grammar", "syntax": "lark" | "regex" as syntax, "definition": str(definition)}:
            kind = ConstraintKind.GRAMMAR if syntax == "lark" else ConstraintKind.REGEX
            return Constraint(kind, definition, f"{where}.format.definition")
        case _:
            problem = "must be of type text, or of type grammar with a definition whose syntax is lark or regex"
            raise Invalid(f"{where}.format: {problem}", "invalid_value", f"{where}.format")


def chosen(choice: str | dict[str, Any] | None, tools: Offered) -> tuple[Sequence[Mapping[str, Any]], ToolUse]:
    """Return which tools a model is told of, and what it must do with them. Raises `Invalid`."""
    match choice:
        case None | "auto":
            return tools.shown, ToolUse()
        case "none":
            return (), ToolUse()
        case "required":
            require(bool(tools.shown), "tool_choice", "required, and there are no tools")
            return tools.shown, ToolUse(forced=True)
        case {"type": "function" | "custom", "name": str(name)}:
            require(name in tools.names, "tool_choice", f"{name!r} is none of the tools")
            return tools.shown, ToolUse(forced=True, name=name)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode}:
            return tools.only(_allowed(choice.get("tools"), tools)), ToolUse(forced=mode == "required")
        case _:
            problem = "tool_choice: must be auto, none, required, a tool's name or allowed_tools"
            raise Invalid(problem, "invalid_value", "tool_choice")


def _allowed(allowed: Any, tools: Offered) -> list[str]:
    require(isinstance(allowed, list), "tool_choice.tools", "must be a list of tools")
    names: list[str] = []
    for number, tool in enumerate(cast("list[Any]", allowed)):
        where = f"tool_choice.tools[{number}]"
        require(isinstance(tool, dict), where, "must be an object")
        fields = cast("dict[str, Any]", tool)
        name = shown_name(fields.get("namespace"), str(fields.get("name")))
        require(fields.get("type") in ("function", "custom") and name in tools.names, where, f"{name!r} is none of the tools")
        names.append(name)
    require(bool(names), "tool_choice.tools", "must name at least one")
    return names
