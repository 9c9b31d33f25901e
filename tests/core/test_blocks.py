"""Block hashes: chained, keyed, and the same however the tokens come in."""

import pytest

from orchestrator.core.blocks import blocks_for, extend_hashes, hash_root, pack_hashes, split_hashes
from orchestrator.core.types import BlockHash

ROOT = hash_root(b"secret", "llama", "tenant")
TOKENS = b"".join(token.to_bytes(4, "little") for token in range(11))


def test_hashes_are_pinned_so_that_caches_survive_a_release() -> None:
    assert ROOT.hex() == "622340ca6036fac77d12ee5a6bafcbbb"
    assert [block.hex() for block in extend_hashes(ROOT, TOKENS, 4)] == [
        "8c7bbde5077f7d4c5e9a4e429d1670a4",
        "a63252261698e059c54633daba807141",
    ]


def test_a_root_depends_on_secret_model_and_salt_and_on_where_one_ends() -> None:
    roots = [
        hash_root(b"secret", "llama", "tenant"),
        hash_root(b"other", "llama", "tenant"),
        hash_root(b"secret", "qwen", "tenant"),
        hash_root(b"secret", "llama", "other"),
        hash_root(b"secret", "llamat", "enant"),
        hash_root(b"s" * 65, "llama", "tenant"),
        hash_root(b"", "llama", "tenant"),
    ]
    assert len(set(roots)) == len(roots)


def test_only_full_blocks_are_named() -> None:
    assert len(extend_hashes(ROOT, TOKENS, 4)) == 2
    assert extend_hashes(ROOT, TOKENS[:12], 4) == []
    assert extend_hashes(ROOT, b"", 4) == []


def test_a_chain_goes_on_from_any_block() -> None:
    whole = extend_hashes(ROOT, TOKENS, 2)
    assert whole[:2] + extend_hashes(whole[1], TOKENS[16:], 2) == whole
    assert extend_hashes(ROOT, memoryview(TOKENS), 2) == whole


def test_equal_blocks_after_different_ones_have_different_names() -> None:
    one, two = (1).to_bytes(4, "little"), (2).to_bytes(4, "little")
    assert extend_hashes(ROOT, one + two, 1)[1] != extend_hashes(ROOT, two + two, 1)[1]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_packed_hashes_come_apart_again(count: int) -> None:
    hashes = tuple(BlockHash(index.to_bytes(16, "big")) for index in range(count))
    assert split_hashes(pack_hashes(hashes)) == hashes


def test_a_packed_run_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="17 bytes are no whole number of 16-byte hashes"):
        split_hashes(bytes(17))


def test_block_counts() -> None:
    assert [blocks_for(tokens, 4) for tokens in (0, 3, 4, 9)] == [0, 1, 1, 3]
