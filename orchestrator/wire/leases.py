"""Leases that wait to be told: what was decided last of each, whoever tells whom.

See also: `codec.py`, which has the messages.
"""

from typing import Any, Protocol, TypeAlias

from orchestrator.wire import codec, node_pb2

LeaseMessage: TypeAlias = node_pb2.Lease | node_pb2.EndedLease


class LeaseFrame(Protocol):
    """A frame that tells of leases: a gateway's to a node or a store, or a node's to a gateway."""

    @property
    def leases(self) -> Any: ...

    @property
    def ended_leases(self) -> Any: ...


class LeaseNews:
    """What has become of leases and was not told yet; bounded by the leases that its owner keeps."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        #: The lease that was heard of first in front.
        self._waiting: dict[str, LeaseMessage] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, message: LeaseMessage) -> None:
        """Tell of a lease or of its end, in place of what waits to be told of it."""
        self._waiting[message.id] = message

    def clear(self) -> None:
        """Tell of nothing that waits."""
        self._waiting.clear()

    def add_to(self, frame: LeaseFrame, size: int) -> int:
        """Put what waits into a frame of so many bytes, one at least, as far as frames go; return its bytes then."""
        for lease, message in list(self._waiting.items()):
            grown = size + message.ByteSize()
            if grown > codec.FRAME_BYTES_MAX and (frame.leases or frame.ended_leases):
                break
            size = grown
            del self._waiting[lease]
            if isinstance(message, node_pb2.Lease):
                frame.leases.append(message)
            else:
                frame.ended_leases.append(message)
        return size
