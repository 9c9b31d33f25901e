"""The Responses API at one gateway: reads requests, puts in what they go on from, and keeps what is answered."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from orchestrator.core.types import GatewayId, SessionId, TenantId
from orchestrator.live.asked import Asked, Conversation
from orchestrator.live.http.dialects import Dialect
from orchestrator.live.http.errors import HttpError
from orchestrator.live.http.responses.answers import ResponseWriter, count_body, error_body, error_event
from orchestrator.live.http.responses.ids import new_id
from orchestrator.live.http.responses.items import messages_of
from orchestrator.live.http.responses.requests import Origin, items_of, parse, referred
from orchestrator.live.http.responses.stored import Item, Stored, StoredResponses
from orchestrator.live.text.detokenise import Vocabulary

PATH = "/v1/responses"
_encode = msgspec.json.encode
#: Beginnings of the names of items that come without one.
_KINDS = {
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}


class Responses:
    """The words of /v1/responses at one gateway.

    Args:
        gateway: its number.
        stored: what it keeps.
    """

    def __init__(self, gateway: GatewayId, stored: StoredResponses) -> None:
        self._gateway = gateway
        self._stored = stored
        answered = Dialect(parse, self._writer, error_body, error_event, complete=self._complete)
        #: By path.
        self.endpoints: Mapping[str, Dialect] = {
            PATH: answered,
            f"{PATH}/input_tokens": replace(answered, count=count_body),
        }

    def _complete(self, asked: Asked, tenant: TenantId, session: SessionId | None) -> Asked:
        """Return a request with the whole conversation, in a session that is its chain's unless its client names one.

        Raises:
            HttpError: what it goes on from is not kept here.
            Invalid: an item is none.
        """
        origin = _origin(asked)
        request, name = origin.request, new_id("resp", self._gateway)
        chain = self._chain(tenant, request.previous_response_id)
        own = [self._item(tenant, item) for item in items_of(request)]
        before = [item for one in chain for item in one.items]
        where = [f"previous_response_id[{place}]" for place in range(len(before))] + [f"input[{n}]" for n in range(len(own))]
        messages = messages_of(request.instructions, [*before, *own], where)
        if session is None and (chain or request.stores):
            session = chain[-1].session if chain else SessionId(name)
        assert isinstance(asked.prompt, Conversation), "responses answer conversations"
        return replace(
            asked,
            prompt=replace(asked.prompt, messages=messages),
            hints=replace(asked.hints, session=session),
            origin=replace(origin, id=name, tenant=tenant, session=session, items=own),
        )

    def _chain(self, tenant: TenantId, name: str | None) -> Sequence[Stored]:
        chain = self._stored.chain(tenant, name) if name is not None else ()
        if chain is None:
            problem = f"Previous response with id '{name}' not found."
            raise HttpError(400, problem, code="previous_response_not_found", param="previous_response_id")
        return chain

    def _item(self, tenant: TenantId, item: Item) -> Item:
        """Return an item with a name, or the item that it refers to."""
        name = referred(item)
        if name is None:
            return item if item.get("id") else {"id": new_id(_KINDS.get(str(item.get("type")), "msg"), self._gateway), **item}
        found = self._stored.item(tenant, name)
        if found is None:
            raise HttpError(404, f"Item with id '{name}' not found.", code="item_not_found", param="input")
        return found

    def _writer(self, asked: Asked, vocabulary: Vocabulary) -> ResponseWriter:
        origin = _origin(asked)

        def keep(response: dict[str, Any]) -> None:
            assert origin.tenant is not None, "what is kept is a tenant's"
            assert origin.session is not None, "what is kept is in a session"
            one = Stored(
                id=origin.id,
                previous=origin.request.previous_response_id,
                session=origin.session,
                input=_encode(origin.items),
                output=_encode(response["output"]),
                frame=_encode({**response, "output": []}),
                names=[str(item["id"]) for item in (*origin.items, *response["output"])],
            )
            self._stored.keep(origin.tenant, one)

        return ResponseWriter(asked, origin, self._gateway, vocabulary, keep if origin.request.stores else None)


def _origin(asked: Asked) -> Origin:
    assert isinstance(asked.origin, Origin), f"a request of this API has its origin, not {type(asked.origin).__name__}"
    return asked.origin
