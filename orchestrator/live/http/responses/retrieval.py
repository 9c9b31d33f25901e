"""Shows and forgets kept responses, at whichever gateway keeps them: GET and DELETE /v1/responses/{id}, GET .../input_items."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from orchestrator.core.types import GatewayId, TenantId
from orchestrator.live.http.errors import HttpError
from orchestrator.live.http.responses.ids import gateway_of
from orchestrator.live.http.responses.stored import Item, StoredResponses

_encode = msgspec.json.encode
_LIMIT_DEFAULT, _LIMIT_MAX = 20, 100


#: Status and body of what the gateway of that number answers to a request without a body: method, path, key; None if it does not.
Ask = Callable[[GatewayId, str, str, bytes], Awaitable[tuple[int, bytes] | None]]


class Retrieval:
    """One gateway's.

    Args:
        gateway: its number.
        stored: what it keeps.
        ask: asks another gateway.
    """

    def __init__(self, gateway: GatewayId, stored: StoredResponses, ask: Ask) -> None:
        self._gateway = gateway
        self._stored = stored
        self._ask = ask

    async def elsewhere(self, method: str, path: str, name: str, key: bytes) -> tuple[int, bytes] | None:
        """Return status and body of what another gateway answers, if it is another's response and that one answers."""
        keeper = gateway_of(name)
        if keeper is None or keeper == self._gateway:
            return None
        return await self._ask(keeper, method, path, key)

    def response(self, tenant: TenantId, name: str, query: Mapping[str, str]) -> bytes:
        """Return a response as it was said. Raises `HttpError`."""
        if query.get("stream", "false") != "false":
            raise HttpError(400, "stream: a response that is done is not streamed again", code="invalid_value", param="stream")
        one = self._stored.find(tenant, name)
        if one is None:
            raise _unknown(name)
        return one.body

    def delete(self, tenant: TenantId, name: str) -> bytes:
        """Forget a response. Raises `HttpError`."""
        if not self._stored.remove(tenant, name):
            raise _unknown(name)
        return _encode({"id": name, "object": "response", "deleted": True})

    def input_items(self, tenant: TenantId, name: str, query: Mapping[str, str]) -> bytes:
        """Return some of the items that a response was made from, those of the turns before it included. Raises `HttpError`."""
        chain = self._stored.chain(tenant, name)
        if chain is None:
            raise _unknown(name)
        before = [item for one in chain[:-1] for item in one.items]
        items = [_shown(item) for item in (*before, *chain[-1].asked)]
        limit, order = _limit(query.get("limit")), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise HttpError(400, f"order: must be asc or desc, is {order!r}", code="invalid_value", param="order")
        if order == "desc":
            items.reverse()
        start = _after(items, query.get("after"))
        page, more = items[start : start + limit], len(items) > start + limit
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return _encode({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


def _unknown(name: str) -> HttpError:
    return HttpError(404, f"Response with id '{name}' not found.", code="response_not_found", param="response_id")


def _limit(given: str | None) -> int:
    limit = _LIMIT_DEFAULT if given is None else int(given) if given.isdecimal() else 0
    if not 1 <= limit <= _LIMIT_MAX:
        raise HttpError(400, f"limit: must be 1 to {_LIMIT_MAX}, is {given}", code="invalid_value", param="limit")
    return limit


def _after(items: list[Item], name: str | None) -> int:
    """Return the place after the item of that name."""
    if name is None:
        return 0
    places = [place for place, item in enumerate(items) if item["id"] == name]
    if not places:
        raise HttpError(400, f"after: there is no item {name!r}", code="invalid_value", param="after")
    return places[0] + 1


def _shown(item: Item) -> dict[str, Any]:
    """Return an item as lists of items show it: with its type, and text as a part."""
    if not isinstance(item.get("content"), str):
        return {"type": "message", **item} if "role" in item else item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    return {"type": "message", **item, "content": [{"type": kind, "text": item["content"]}]}
