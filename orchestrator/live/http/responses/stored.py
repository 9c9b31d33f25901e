"""Keeps responses for the turns that go on from them: each tenant's own, bounded in number, bytes and time.

A chain of turns is used as a whole, so its oldest turn is forgotten first, and what goes on from it next. What is kept here dies
with its gateway.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from orchestrator.core.types import SessionId, TenantId

#: What a response takes beside its JSON: objects, and its and its items' places in two indexes.
_RESPONSE_BYTES, _ITEM_BYTES = 1024, 256

Item = dict[str, Any]


_encode = msgspec.json.encode
_ITEMS = msgspec.json.Decoder(list[Item])


@dataclass(frozen=True, slots=True)
class Stored:
    """One response."""

    id: str
    #: The response that it goes on from.
    previous: str | None
    #: Of all turns of its chain, unless a client names another.
    session: SessionId
    #: Its own input and its output, each a JSON list of items; what came before is its predecessors'.
    input: bytes = field(repr=False)
    output: bytes = field(repr=False)
    #: The response as it was said, but for its output: a JSON object.
    frame: bytes = field(repr=False)
    #: Names of the items in input and output.
    names: Sequence[str] = field(repr=False)

    @property
    def asked(self) -> list[Item]:
        """Its own input."""
        return _ITEMS.decode(self.input)

    @property
    def items(self) -> list[Item]:
        """Its own input and its output."""
        return [*self.asked, *_ITEMS.decode(self.output)]

    @property
    def body(self) -> bytes:
        """The whole response as it was said, a JSON object."""
        return _encode({**msgspec.json.decode(self.frame), "output": msgspec.Raw(self.output)})

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return len(self.input) + len(self.output) + len(self.frame) + _RESPONSE_BYTES + _ITEM_BYTES * len(self.names)


class _Shelf:
    """One tenant's responses, those used last at the end."""

    __slots__ = ("bytes", "items", "responses", "used_s")

    def __init__(self) -> None:
        self.responses: OrderedDict[str, Stored] = OrderedDict()
        self.used_s: dict[str, float] = {}
        #: Which response has an item: the last that had it.
        self.items: dict[str, str] = {}
        self.bytes = 0

    def add(self, one: Stored, now: float) -> None:
        self.responses[one.id] = one
        self.used_s[one.id] = now
        self.items.update(dict.fromkeys(one.names, one.id))
        self.bytes += one.bytes

    def use(self, name: str, now: float) -> None:
        self.responses.move_to_end(name)
        self.used_s[name] = now

    def remove(self, name: str) -> None:
        one = self.responses.pop(name)
        del self.used_s[name]
        self.bytes -= one.bytes
        for item in one.names:
            if self.items.get(item) == name:
                del self.items[item]


class StoredResponses:
    """One gateway's. Belongs to one event loop.

    Args:
        tenants: whose responses are kept; all have an equal share.
        responses_max, bytes_max: of all tenants together.
        seconds_max: after its last use.
        clock: seconds.
    """

    def __init__(
        self,
        tenants: Sequence[TenantId],
        responses_max: int,
        bytes_max: int,
        seconds_max: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shelves = {tenant: _Shelf() for tenant in tenants}
        self._responses_max = max(1, responses_max // len(tenants))
        self._bytes_max = bytes_max // len(tenants)
        self._seconds_max = seconds_max
        self._clock = clock

    def keep(self, tenant: TenantId, one: Stored) -> None:
        """Keep a response, and forget others as needed; one that is larger than a tenant's whole share is not kept."""
        if one.bytes > self._bytes_max:
            return
        shelf, now = self._fresh(tenant)
        shelf.add(one, now)
        while len(shelf.responses) > self._responses_max or shelf.bytes > self._bytes_max:
            shelf.remove(next(iter(shelf.responses)))

    def find(self, tenant: TenantId, name: str) -> Stored | None:
        """Return a response; None if the tenant has none of that name."""
        shelf, _ = self._fresh(tenant)
        return shelf.responses.get(name)

    def chain(self, tenant: TenantId, name: str) -> list[Stored] | None:
        """Return a response after all that it goes on from, the first turn first; None if any of them is not there.

        All of them count as used.
        """
        shelf, now = self._fresh(tenant)
        chain: list[Stored] = []
        wanted: str | None = name
        while wanted is not None:
            one = shelf.responses.get(wanted)
            if one is None:
                return None
            chain.append(one)
            wanted = one.previous
        chain.reverse()
        for one in chain:
            shelf.use(one.id, now)
        return chain

    def item(self, tenant: TenantId, name: str) -> Item | None:
        """Return the item of that name, from any of a tenant's responses."""
        shelf, _ = self._fresh(tenant)
        holder = shelf.items.get(name)
        if holder is None:
            return None
        return next(item for item in shelf.responses[holder].items if item.get("id") == name)

    def remove(self, tenant: TenantId, name: str) -> bool:
        """Forget a response; return whether there was one."""
        shelf, _ = self._fresh(tenant)
        if name not in shelf.responses:
            return False
        shelf.remove(name)
        return True

    def _fresh(self, tenant: TenantId) -> tuple[_Shelf, float]:
        """Return a tenant's shelf without what is too old, and the time."""
        shelf, now = self._shelves[tenant], self._clock()
        while shelf.responses:
            oldest = next(iter(shelf.responses))
            if now - shelf.used_s[oldest] <= self._seconds_max:
                break
            shelf.remove(oldest)
        return shelf, now
