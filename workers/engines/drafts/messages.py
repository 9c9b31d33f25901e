"""What crosses between a node and the process that drafts for it: tokens that are new one way, drafts the other.

A connection is greeted as those between ranks of a group are (`greetings.py`). Then each message is its length and so many bytes
of MessagePack: `Welcome` first, and then an `Answer` to each `Ask` that has sequences, in order.
"""

import struct
import sys
from array import array
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from orchestrator.core.config import DRAFT_TOKENS_MAX
from workers.engines.base import EngineLost
from workers.engines.greetings import Stream, framed

Kind = TypeVar("Kind")

#: Bytes of one message at most, and tokens of sequences that begin in one.
MESSAGE_BYTES_MAX = 1 << 24
BEGINNING_TOKENS_MAX = 1 << 16
#: What both must agree in.
SAID = {"bytes": sys.byteorder, "drafts": 1}
_LENGTH = struct.Struct("<I")


class DraftsLost(EngineLost):
    """The other side is gone, or says what means nothing. That ends no node: it goes on without drafts."""


class Welcome(msgspec.Struct, array_like=True, frozen=True):
    """What a process that drafts says of itself."""

    #: Tokens of a sequence that it sees at most, and sequences that it sees at a time at most, of all nodes together.
    context_tokens: Annotated[int, Meta(ge=1)]
    slots: Annotated[int, Meta(ge=1)]


class Told(msgspec.Struct, array_like=True, frozen=True):
    """What is new of a sequence, which is to be drafted for."""

    request: Annotated[int, Meta(ge=0)]
    #: Its tokens since it was told of last; its last ones if it begins.
    tokens: bytes
    #: Drafts that it may have.
    most: Annotated[int, Meta(ge=1, le=DRAFT_TOKENS_MAX)]
    begins: bool = False


class Ask(msgspec.Struct, array_like=True, frozen=True):
    """What a node asks for a step, and which sequences it asks nothing more for."""

    sequences: list[Told]
    forgotten: list[int]


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """Drafts, one entry for each sequence of the `Ask`."""

    #: None: the sequence has no slot, and is to be told of from its beginning if it is asked for again.
    drafts: list[bytes | None]
    #: Slots that are taken now.
    taken: Annotated[int, Meta(ge=0)]


_ENCODER = msgspec.msgpack.Encoder()


def packed(message: Welcome | Ask | Answer) -> bytes:
    """Return a message as it crosses."""
    return framed(_ENCODER.encode(message))


def unpacked(data: bytes, kind: type[Kind]) -> Kind:
    """Return a message without its length. Raises `DraftsLost`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise DraftsLost(f"what came is no {kind.__name__}: {error}") from error


def tokens_of(data: bytes, vocabulary: int) -> "array[int]":
    """Return tokens that crossed. Raises `DraftsLost` for what are none of a vocabulary."""
    tokens = array("I")
    if len(data) % tokens.itemsize:
        raise DraftsLost(f"{len(data)} bytes are no tokens")
    tokens.frombytes(data)
    if tokens and max(tokens) >= vocabulary:
        raise DraftsLost(f"token {max(tokens)} is not in a vocabulary of {vocabulary}")
    return tokens


class Incoming:
    """Messages that come by a stream, which need not come whole."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._begin()

    def next(self) -> bytes | None:
        """Return the next message if all of it is there. Raises `OSError`, or `DraftsLost` for one that is too long."""
        if not self._stream.fill(self._views):
            return None
        if self._body is None:
            (length,) = _LENGTH.unpack(self._head)
            if length > MESSAGE_BYTES_MAX:
                raise DraftsLost(f"a message of {length} bytes: at most {MESSAGE_BYTES_MAX} are read")
            self._body = bytearray(length)
            self._views = [memoryview(self._body)] if length else []
            if not self._stream.fill(self._views):
                return None
        body = bytes(self._body)
        self._begin()
        return body

    def _begin(self) -> None:
        self._head = bytearray(_LENGTH.size)
        self._body: bytearray | None = None
        self._views = [memoryview(self._head)]
