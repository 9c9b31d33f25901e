"""Names of responses and of their items: each says which gateway keeps it, so that whichever is asked can find it.

resp_ + the gateway's number (3 hex digits) + 45 random hex digits
"""

from secrets import randbits

from orchestrator.core.types import GatewayId

_GATEWAY_DIGITS, _RANDOM_DIGITS = 3, 45
_HEX = frozenset("0123456789abcdef")


def new_id(kind: str, gateway: GatewayId) -> str:
    """Return a name that nobody has or can guess."""
    return f"{kind}_{gateway:0{_GATEWAY_DIGITS}x}{randbits(4 * _RANDOM_DIGITS):0{_RANDOM_DIGITS}x}"


def gateway_of(name: str) -> GatewayId | None:
    """Return which gateway keeps what is called so; None if that is no name of ours."""
    digits = name.rpartition("_")[2]
    if len(digits) != _GATEWAY_DIGITS + _RANDOM_DIGITS or not _HEX.issuperset(digits):
        return None
    return GatewayId(int(digits[:_GATEWAY_DIGITS], 16))
