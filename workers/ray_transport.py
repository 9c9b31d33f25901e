"""Ray's object store as the way for KV blocks between hosts. Imported only by processes that Ray started.

References travel in our own messages, so they are serialised outside of Ray's calls. Ray's public way for that
(`ray.cloudpickle`) keeps such an object for good; the calls below are what it uses underneath, without the pin: the source
holds its reference until the peer has acknowledged, and the object goes with it.
"""

import struct
from typing import Any

import numpy as np
import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayError

from orchestrator.wire.trust import Trust
from workers.memory import TransferFailed

#: Lengths of the object's id and of its owner's address; the object's status follows.
_LENGTHS = struct.Struct("<HH")


def _core() -> Any:
    return ray_worker.global_worker.core_worker  # pyright: ignore[reportAttributeAccessIssue]


def _ends(reference: bytes) -> tuple[int, int]:
    binary, owner = _LENGTHS.unpack_from(reference)
    return _LENGTHS.size + binary, _LENGTHS.size + binary + owner


class RayObjects:
    """An `ObjectStore` on Ray's plasma stores; works in any process connected to the cluster.

    What stands behind a reference is unpickled by Ray. So a reference bears a seal of the cluster: one that no node of it made
    is not looked at.
    """

    def __init__(self, trust: Trust) -> None:
        self._trust = trust

    def put(self, data: memoryview) -> tuple[object, bytes]:
        """Store bytes in this host's plasma store."""
        try:
            reference = ray.put(np.frombuffer(data, dtype=np.uint8))
            _, owner, status = _core().serialize_object_ref(reference)
        except RayError as error:
            raise TransferFailed(f"Ray cannot store {len(data)} bytes: {error}") from error
        binary = reference.binary()
        return reference, self._trust.sealed(_LENGTHS.pack(len(binary), len(owner)) + binary + owner + status)

    def get(self, reference: bytes, timeout_s: float) -> memoryview:
        """Return a view of this host's copy, fetched if need be; valid while it is referred to."""
        opened = self._trust.unsealed(reference)
        if opened is None:
            raise TransferFailed("the reference to an object is not one that this cluster's nodes made")
        reference = opened
        binary_end, owner_end = _ends(reference)
        binary, owner, status = reference[_LENGTHS.size : binary_end], reference[binary_end:owner_end], reference[owner_end:]
        handle = ray.ObjectRef(binary, owner)  # pyright: ignore[reportArgumentType] (bytes, whatever its stub says)
        try:
            _core().deserialize_and_register_object_ref(binary, ray.ObjectRef.nil(), owner, status)
            return ray.get(handle, timeout=timeout_s).data
        except RayError as error:
            raise TransferFailed(f"Ray did not bring the object: {error}") from error
