"""Names KV blocks: a block's hash covers its tokens and everything before them, so equal hashes mean equal prefixes.

The chain starts from a root keyed by the cluster's secret and made of the model's fingerprint and the tenant's salt: whoever does
not know the secret can neither guess a root nor forge a hash, and tenants with different salts never share a block.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain
from typing import cast

from orchestrator.core.types import BlockHash

HASH_BYTES = 16
TOKEN_BYTES = 4
#: blake2b takes no longer key; a longer secret is hashed down to one.
SECRET_BYTES_MAX = 64
#: Hashes unpacked by one call into C at most.
RUN_HASHES = 256
#: By the number of hashes.
_RUNS = tuple(struct.Struct(f"{HASH_BYTES}s" * count) for count in range(RUN_HASHES + 1))


def hash_root(secret: bytes, fingerprint: str, salt: str) -> BlockHash:
    """Return the hash that stands before a prompt's first block.

    Args:
        secret: the cluster's; keys the hash.
        fingerprint: names the model's weights and tokenizer.
        salt: the tenant's; different salts share nothing.
    """
    key = secret if len(secret) <= SECRET_BYTES_MAX else blake2b(secret).digest()
    name = fingerprint.encode()
    digest = blake2b(len(name).to_bytes(4, "little") + name + salt.encode(), digest_size=HASH_BYTES, key=key)
    return BlockHash(digest.digest())


def hash_bytes(block: BlockHash) -> bytes:
    """Return a block's hash as it goes over the wire: 16 bytes. Blocks of simulations have none."""
    return cast(bytes, block)


def extend_hashes(parent: BlockHash, tokens: bytes | memoryview, block_tokens: int) -> list[BlockHash]:
    """Return the hashes of the full blocks in `tokens`, which follow the block named `parent`.

    Args:
        parent: hash of the block before the first token, or the root.
        tokens: uint32 little-endian, packed; what does not fill a last block is left out.
        block_tokens: tokens in a block.
    """
    size = block_tokens * TOKEN_BYTES
    data = bytes(tokens)
    hashes: list[BlockHash] = []
    name = hash_bytes(parent)
    for start in range(0, len(data) - size + 1, size):
        name = blake2b(name + data[start : start + size], digest_size=HASH_BYTES).digest()
        hashes.append(BlockHash(name))
    return hashes


def pack_hashes(hashes: Sequence[BlockHash]) -> bytes:
    """Return the hashes one after the other, as they go over the wire."""
    return b"".join(cast(Sequence[bytes], hashes))


def split_hashes(packed: bytes) -> tuple[BlockHash, ...]:
    """Return the hashes in a packed run. Raises `ValueError` if its length is no multiple of a hash's."""
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of {HASH_BYTES}-byte hashes")
    count = len(packed) // HASH_BYTES
    if count <= RUN_HASHES:
        return cast(tuple[BlockHash, ...], _RUNS[count].unpack(packed))
    whole = count // RUN_HASHES * RUN_HASHES * HASH_BYTES
    runs = _RUNS[RUN_HASHES].iter_unpack(memoryview(packed)[:whole])
    return (*chain.from_iterable(runs), *_RUNS[count % RUN_HASHES].unpack(packed[whole:]))


def common_blocks(one: Sequence[BlockHash], other: Sequence[BlockHash], blocks_max: int | None = None) -> int:
    """Return how many first blocks two chains have in common, `blocks_max` at most, by bisection."""
    low, high = 0, min(len(one), len(other), *(() if blocks_max is None else (blocks_max,)))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Return how many blocks a run of tokens needs, the last one perhaps part filled."""
    return -(-tokens // block_tokens)
