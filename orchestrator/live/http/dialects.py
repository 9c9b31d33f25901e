"""What makes an API's words usable at an endpoint: a parser of bodies, a writer of answers, and how errors are said.

    body --parse--> Asked  ...  pieces --writer--> bytes

A dialect is a folder beside `openai/` that makes such objects and a line in `gateway.py` that says at which path; nothing else
knows whose words are spoken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.core.types import SessionId, TenantId
from orchestrator.live.asked import Asked
from orchestrator.live.choices import Usage
from orchestrator.live.http.errors import HttpError
from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.generation import Generation, Piece


class Writer(Protocol):
    """Writes one answer, whole or as a stream of events:  opening* (events* ending)* closing,  or  broken  instead."""

    def opening(self, index: int, usage: Usage) -> bytes:
        """Return what comes before a choice's first text, as its first tokens are there; empty if nothing does."""
        ...

    def events(self, index: int, pieces: Sequence[Piece]) -> list[bytes]:
        """Return what tells of some more of a choice."""
        ...

    def ending(self, index: int, done: Generation) -> bytes:
        """Return what says why a choice ended."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """Return what ends a stream all of whose choices have ended."""
        ...

    def broken(self, error: HttpError) -> bytes:
        """Return what ends a stream that cannot go on."""
        ...

    def whole(self, generations: Sequence[tuple[Generation, Sequence[Piece]]], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed, its choices in order."""
        ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """The words of one endpoint."""

    #: Reads and checks a body; raises `Invalid`.
    parse: Callable[[bytes], Asked]
    #: Makes what writes the answer to a request.
    writer: Callable[[Asked, Vocabulary], Writer]
    #: Says an error of a request, which is named, as a body.
    error_body: Callable[[HttpError, str], bytes]
    #: Says an error within a stream, after which nothing comes.
    error_event: Callable[[HttpError], bytes]
    #: Puts in what an earlier request of the tenant's left at this gateway, and names the session if the client does not; None
    #: where requests bring all they ask with. Raises `HttpError` or `Refused`.
    complete: Callable[[Asked, TenantId, SessionId | None], Asked] | None = None
    #: Says how many tokens a prompt has, which is all that is asked for; None: prompts are answered.
    count: Callable[[int], bytes] | None = None
    #: A further header that names the request.
    request_header: bytes | None = None
