"""Errors as HTTP has them: a status beside what every API says of an error in its own words (`dialects.py`)."""

from orchestrator.live.refusals import Invalid, KeyUnknown, ModelUnknown, Refused
from orchestrator.live.turns import TurnFailed

#: How bodies may be compressed (`codings.py`).
ACCEPTED_CODINGS = b"gzip, deflate"
_STATUSES: dict[type[Refused], int] = {Invalid: 400, KeyUnknown: 401, ModelUnknown: 404}


class HttpError(Exception):
    """A request ends with this status."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        #: For programs.
        self.code = code
        #: The field that is wrong.
        self.param = param
        self.retry_after_s = retry_after_s
        #: Methods that a path has, of a 405.
        self.allow = allow

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer's head says of it."""
        headers: list[tuple[bytes, bytes]] = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(self.retry_after_s))))
        if self.status in (429, 503, 529) and self.code:
            headers.append((b"x-weft-refused", self.code.encode()))
        if self.allow:
            headers.append((b"allow", self.allow.encode()))
        if self.status == 415:
            headers.append((b"accept-encoding", ACCEPTED_CODINGS))
        return headers


def http_error(error: Refused | TurnFailed) -> HttpError:
    """Return what HTTP makes of a refusal or of a turn's failure."""
    if isinstance(error, TurnFailed):
        return HttpError(error.status, error.message, error.code, retry_after_s=error.retry_after_s)
    return HttpError(_STATUSES[type(error)], error.message, error.code, error.field)


def fault() -> HttpError:
    """Return what clients are told of a fault of ours."""
    return HttpError(500, "internal error; its cause is in the server's log", code="internal_error")
