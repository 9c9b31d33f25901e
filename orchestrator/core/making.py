"""Makes instances of frozen dataclasses at the price of plain ones.

What a frozen dataclass generates for itself sets each field through a call that gets around its own guard: a microsecond or two
for ten fields, where a plain one takes a fifth. Nouns, of which every event makes several, then cost more than what is decided
with them. See also: `types.py`, `events.py`.
"""

from dataclasses import fields, make_dataclass
from typing import TypeVar

T = TypeVar("T")


def quickly_made(frozen: type[T]) -> type[T]:
    """Let a frozen dataclass be made as one that is not frozen; returns the class.

    It stays frozen to the type checker, which reads all code that has instances, and hashable. Nothing refuses a change when
    the program runs.
    """
    assert not hasattr(frozen, "__post_init__"), f"{frozen.__name__} checks itself when it is made"
    known = fields(frozen)  # pyright: ignore[reportArgumentType]
    plain = make_dataclass(frozen.__name__, [(field.name, field.type, field) for field in known], repr=False, eq=False)
    del frozen.__setattr__, frozen.__delattr__
    assert frozen.__setattr__ is object.__setattr__, f"{frozen.__name__} is of a class that guards itself"
    made = vars(plain)["__init__"]
    made.__qualname__ = f"{frozen.__qualname__}.__init__"
    frozen.__init__ = made
    return frozen
