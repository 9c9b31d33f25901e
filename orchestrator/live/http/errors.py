"""Errors as HTTP has them: a status beside what every API says of an error in its own words (`dialects.py`)."""

from orchestrator.live.refusals import Invalid, KeyUnknown, ModelUnknown, Refused
from orchestrator.live.turns import TurnFailed

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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        #: For programs.
        self.code = code
        #: The field that is wrong.
        self.param = param
        self.retry_after_s = retry_after_s


def http_error(error: Refused | TurnFailed) -> HttpError:
    """Return what HTTP makes of a refusal or of a turn's failure."""
    if isinstance(error, TurnFailed):
        return HttpError(error.status, error.message, error.code, retry_after_s=error.retry_after_s)
    return HttpError(_STATUSES[type(error)], error.message, error.code, error.field)


def fault() -> HttpError:
    """Return what clients are told of a fault of ours."""
    return HttpError(500, "internal error; its cause is in the server's log", code="internal_error")
