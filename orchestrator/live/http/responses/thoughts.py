"""Thoughts that travel through clients: in an item that they bring back, even where they keep nothing else of it.

`encrypted_content` is what OpenAI's API has for that. Here thoughts are told in plain as well: it hides nothing.
"""

from base64 import b64decode, b64encode
from binascii import Error
from typing import Any, cast

_MARK = b"weft:"


def carried(thoughts: str) -> str:
    """Return thoughts as `encrypted_content`."""
    return b64encode(_MARK + thoughts.encode()).decode()


def thoughts_of(item: dict[str, Any]) -> str:
    """Return the thoughts of a reasoning item: what it carries, else its content or summary; empty if it has none of ours."""
    brought = item.get("encrypted_content")
    if isinstance(brought, str):
        try:
            data = b64decode(brought, validate=True)
            if data.startswith(_MARK):
                return data.removeprefix(_MARK).decode()
        except (Error, ValueError):
            pass  # Another server's, which only that one can read.
    return _joined(item.get("content")) or _joined(item.get("summary"))


def _joined(parts: Any) -> str:
    if not isinstance(parts, list):
        return ""
    texts = [cast("dict[str, Any]", part).get("text") for part in cast("list[Any]", parts) if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))
