"""Reads bodies of requests: JSON straight into a dialect's structures; what is wrong with one is said alike in all APIs."""

import codecs
from typing import Any, TypeVar, cast

import msgspec

from orchestrator.live.refusals import Invalid, require

Wanted = TypeVar("Wanted")


def decode(decoder: "msgspec.json.Decoder[Wanted]", body: bytes) -> Wanted:
    """Return what a body holds; numbers may be whole by value alone. Raises `Invalid`."""
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            # JSON does not tell 4.0 from 4, and some clients' languages do not either.
            return msgspec.convert(_whole(msgspec.json.decode(body)), decoder.type)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").removeprefix(".") or None
        raise Invalid(f"{param}: {problem}" if param else problem, "invalid_type", param) from error
    except RecursionError as error:
        raise Invalid("the body is nested too deeply", "invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"the body is not valid JSON: {error}", "invalid_json") from error


def check_range(param: str, value: float | None, least: float, most: float | None = None) -> None:
    """Refuse a number outside [least, most]; absent numbers are fine."""
    if value is None or (value >= least and (most is None or value <= most)):
        return
    bounds = f"{least} or more" if most is None else f"from {least} to {most}"
    require(False, param, f"must be {bounds}, is {value}")


def _whole(body: Any) -> Any:
    """Return a body in which the numbers of its fields, and of lists of them, are whole where they can be."""
    if not isinstance(body, dict):
        return body
    fields = cast("dict[str, Any]", body)
    return {name: _integral(value) for name, value in fields.items()}


def _integral(value: Any) -> Any:
    if isinstance(value, list):
        return [_integral(one) for one in cast("list[Any]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value
