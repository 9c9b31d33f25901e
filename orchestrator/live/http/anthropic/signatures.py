"""Signatures of thoughts: opaque to clients, who send them back with the thoughts in later turns.

A signature proves nothing here: thoughts are taken as a client sends them, like all else that it says a model said. Those of
thoughts whose text is withheld hold them, so that later turns show them to the model nevertheless.
"""

import base64
import binascii
from hashlib import blake2b

_HOLDS = "weft-holds-"
_NAMES = "weft-names-"


def signature_of(thoughts: str, withheld: bool) -> str:
    """Return what a client gets with thoughts; with those that are withheld it gets nothing else."""
    if withheld:
        return _HOLDS + base64.b64encode(thoughts.encode()).decode()
    return _NAMES + blake2b(thoughts.encode(), digest_size=24).hexdigest()


def thoughts_in(signature: str) -> str:
    """Return the thoughts that a signature holds, none if it holds none or is not one of ours."""
    if not signature.startswith(_HOLDS):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_HOLDS), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
