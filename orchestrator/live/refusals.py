"""Why a request is refused before it becomes turns, in no API's words; each API says it in its own.

    Refused               what is wrong, a code for programs, and which field
     ├─ Invalid           what is asked cannot be; the client must ask for something else
     ├─ KeyUnknown        the key stands for nobody
     └─ ModelUnknown      no model has that name

What is refused later, by the cluster, is a `TurnFailed` (`turns.py`).
"""


class Refused(Exception):
    """A request that cannot be served; nothing of it was started."""

    def __init__(self, message: str, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        #: What of the request is wrong, if it is one field.
        self.field = field


class Invalid(Refused):
    """What is asked cannot be."""


class KeyUnknown(Refused):
    """A key stands for nobody, or there is none."""

    def __init__(self, message: str = "the API key is missing or wrong") -> None:
        super().__init__(message, "invalid_api_key")


class ModelUnknown(Refused):
    """No model has that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {name!r} does not exist", "model_not_found", "model")


def require(holds: bool, field: str, problem: str) -> None:
    """Raise the `Invalid` for a wrong value of a field unless `holds`."""
    if not holds:
        raise Invalid(f"{field}: {problem}", "invalid_value", field)
