"""What Anthropic's API has and is not served here: refused by its name unless it asks for nothing."""

from typing import Any, cast

from orchestrator.live.http.anthropic.bodies import MessagesRequest, Tool
from orchestrator.live.refusals import require

#: Edits that are the chat template's business: which thoughts of earlier turns the model sees.
_TEMPLATES_EDIT = "clear_thinking_"


def check_unserved(request: MessagesRequest) -> None:
    """Refuse what would have to be done on a server of Anthropic's. Raises `Invalid`."""
    for name, value in (("container", request.container), ("mcp_servers", request.mcp_servers)):
        require(not value, name, "is not served here; leave it out")
    management: Any = request.context_management
    edits = cast("dict[str, Any]", management).get("edits") if isinstance(management, dict) else management
    for place, edit in enumerate(cast("list[Any]", edits) if isinstance(edits, list) else [edits] if edits else []):
        kind = cast("dict[str, Any]", edit).get("type") if isinstance(edit, dict) else edit
        field = f"context_management.edits.{place}"
        require(isinstance(kind, str) and kind.startswith(_TEMPLATES_EDIT), field, f"{kind!r} is not served here; leave it out")


def check_tool(tool: Tool, field: str) -> None:
    """Refuse a tool that Anthropic defines or runs. Raises `Invalid`."""
    own = tool.type in (None, "custom")
    require(own, field, f"{tool.type!r} is a tool of Anthropic's servers; only tools with an input_schema are served here")
