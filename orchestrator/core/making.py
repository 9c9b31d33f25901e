"""Makes instances of frozen dataclasses at little more than the price of plain ones.

What a frozen dataclass generates for itself sets each field through a call that gets around the freeze. Nouns with many fields,
of which every event makes several, then cost more than what is decided with them. See also: `types.py`, `events.py`.
"""

from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")


def quickly_made(frozen: type[T]) -> type[T]:
    """Let a frozen dataclass with slots be made faster; nothing else about it changes. Returns the class.

    An instance is filled while it is of another class, of the same shape and not frozen.
    """
    assert not hasattr(frozen, "__post_init__"), f"{frozen.__name__} checks itself when it is made"
    known = fields(frozen)  # pyright: ignore[reportArgumentType]
    names = [field.name for field in known]
    space: dict[str, Any] = {
        "become": object.__setattr__,
        "Open": type(f"Open{frozen.__name__}", frozen.__bases__, {"__slots__": tuple(names)}),
        "Frozen": frozen,
    }
    parameters: list[str] = []
    values: list[str] = []
    for field in known:
        name, made = field.name, field.default_factory is not MISSING
        plain = field.init and not field.kw_only
        assert plain, f"{frozen.__name__}.{name} needs more than a value in its place"
        space[f"default_{name}"] = field.default_factory if made else field.default
        parameters.append(name if field.default is MISSING and not made else f"{name}=default_{name}")
        values.append(f"default_{name}() if {name} is default_{name} else {name}" if made else name)
    lines = [f"def __init__(self, {', '.join(parameters)}):", "become(self, '__class__', Open)"]
    lines += [f"self.{name} = {value}" for name, value in zip(names, values, strict=True)]
    lines += ["self.__class__ = Frozen"]
    exec("\n    ".join(lines), space)  # as `dataclasses` makes its own
    space["__init__"].__annotations__ = frozen.__init__.__annotations__
    space["__init__"].__qualname__ = f"{frozen.__qualname__}.__init__"
    frozen.__init__ = space["__init__"]
    return frozen
