"""OpenAI's older words for tools, `functions` and `function_call`: made what tools say, and what is called told back in them."""

from typing import Any

from orchestrator.live.http.openai.bodies import ChatRequest, MessageToolCall
from orchestrator.live.refusals import Invalid, require

#: `Asked.origin` of what is to be answered in these words.
FUNCTIONS = "functions"


def modernise(request: ChatRequest) -> bool:
    """Say in today's words what a chat says in older ones; return whether its answer is to be in those. Raises `Invalid`."""
    for message in request.messages:
        if message.function_call is not None:
            require(not message.tool_calls, "messages", "a message has tool_calls or a function_call, not both")
            message.tool_calls = [MessageToolCall(message.function_call)]
        elif message.role == "function":
            message.role = "tool"
    if not request.functions:
        choice = request.function_call
        require(choice in (None, "none", "auto"), "function_call", "needs functions")
        return False
    require(request.tools is None and request.tool_choice is None, "functions", "cannot be combined with tools")
    for place, function in enumerate(request.functions):
        require(isinstance(function.get("name"), str), f"functions[{place}].name", "must be a name")
    request.tools = [{"type": "function", "function": function} for function in request.functions]
    # Their words have place for one call.
    request.parallel_tool_calls = False
    request.tool_choice = _choice(request.function_call, {function["name"] for function in request.functions})
    return True


def _choice(written: Any, names: set[str]) -> str | dict[str, Any] | None:
    match written:
        case None | "auto" | "none":
            return written
        case {"name": str(name)} if name in names:
            return {"type": "function", "function": {"name": name}}
        case _:
            raise Invalid(
                "function_call: must be auto, none or the name of one of the functions", "invalid_value", "function_call"
            )
