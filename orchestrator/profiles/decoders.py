"""What a tokenizer.json says of how its tokens become bytes.

Gateways make text of answers by it, engines tell which tokens a grammar's text may go on with.
"""

from collections.abc import Mapping
from typing import Any, cast

from tokenizers import Tokenizer


def is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    """Tell whether tokens are bytes in GPT-2's alphabet, and nothing else happens to them."""
    match decoder:
        case {"type": "ByteLevel"}:
            return True
        case {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}:
            return True
        case _:
            return False


def falls_back_to_bytes(decoder: Mapping[str, Any] | None) -> bool:
    """Tell whether tokens such as <0xE6> are taken for bytes."""
    match decoder:
        case {"type": "ByteFallback"}:
            return True
        case {"type": "Sequence", "decoders": parts}:
            return any(falls_back_to_bytes(part) for part in cast(list[dict[str, Any]], parts))
        case _:
            return False


#: Steps of a decoder that take each token for itself, but for the first of a text.
_LOCAL = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


def local_steps(decoder: Mapping[str, Any] | None) -> list[dict[str, Any]] | None:
    """Return a decoder's steps, if each token has a text of its own whatever stands beside it; None if not."""
    if decoder is None:
        return None
    parts = cast("list[dict[str, Any]]", decoder["decoders"]) if decoder.get("type") == "Sequence" else [dict(decoder)]
    return parts if is_byte_level(decoder) or all(part["type"] in _LOCAL for part in parts) else None


def lone_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Return the tokens that stand for one byte each, with their bytes."""
    names = ((byte, name) for byte in range(256) for name in {f"<0x{byte:02X}>", f"<0x{byte:02x}>"})
    return {token: byte for byte, name in names if (token := tokenizer.token_to_id(name)) is not None}


def _byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


BYTE_OF = _byte_of()
