"""The KV index: nested holders found by bisection, batches applied in order, departed nodes cleaned up."""

import random

import pytest

from orchestrator.core.cluster.following import Trust
from orchestrator.core.cluster.kvindex import KvIndex, Matches, PredictedKv
from orchestrator.core.types import BlockHash, KvBatch, NodeId, RequestId, StoredRun
from tests.builders import prompt_hashes
from tests.core.cluster.cluster_builders import stored

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def index_of(**held: str) -> KvIndex:
    """Return an index in which each node holds one prompt, one letter a block."""
    index = KvIndex()
    for name, prompt in held.items():
        index.add_node(NodeId(name), blocks_max=1000)
        index.apply(NodeId(name), stored(prompt, cleared=True))
    return index


def found(index: KvIndex, prompt: str) -> dict[str, int]:
    matches = index.find(prompt_hashes(prompt))
    index.validate()
    return {name: matches.blocks(index.column(NodeId(name))) for name in ("a", "b", "c")}


def test_each_node_matches_as_far_as_it_holds_the_prompt() -> None:
    index = index_of(a="uvwxyz", b="uvw", c="uv12")
    assert found(index, "uvwxyz") == {"a": 6, "b": 3, "c": 2}
    assert found(index, "uvw") == {"a": 3, "b": 3, "c": 2}
    assert found(index, "uv1") == {"a": 2, "b": 2, "c": 3}
    assert found(index, "q") == {"a": 0, "b": 0, "c": 0}
    assert found(index, "") == {"a": 0, "b": 0, "c": 0}


def test_matches_say_how_many_nodes_share_a_depth() -> None:
    index = index_of(a="uvwxyz", b="uvw", c="uvw")
    a, bc = 1 << index.column(A), 1 << index.column(B) | 1 << index.column(C)
    assert index.find(prompt_hashes("uvwxyz")) == Matches(((3, a | bc), (6, a)))
    assert index.find(prompt_hashes("uvwxyz")).blocks_max == 6


@pytest.mark.parametrize(
    ("levels", "held"),
    [
        ((), [0, 0, 0, 0]),
        (((5, 0b1111),), [5, 5, 5, 5]),
        (((5, 0b0100),), [0, 0, 5, 0]),
        (((1, 0b1111), (2, 0b0011), (9, 0b0010)), [2, 9, 1, 1]),
    ],
)
def test_blocks_by_column(levels: tuple[tuple[int, int], ...], held: list[int]) -> None:
    assert Matches(levels).by_column(4) == held
    assert [Matches(levels).blocks(column) for column in range(4)] == held


def test_removed_blocks_are_forgotten_for_one_node_only() -> None:
    index = index_of(a="uvw", b="uvw")
    index.add_node(C, blocks_max=10)
    assert index.apply(A, KvBatch(2, removed=prompt_hashes("uvw")[1:])) is Trust.EXACT
    assert found(index, "uvw") == {"a": 1, "b": 3, "c": 0}
    assert (index.believed_blocks(A), index.believed_blocks(B), index.blocks) == (1, 3, 3)
    index.apply(B, KvBatch(2, removed=prompt_hashes("uvw")[1:]))
    assert index.blocks == 1  # nobody holds the others any more


def test_a_batch_removes_before_it_stores() -> None:
    index = index_of(a="uv", b="", c="")
    batch = KvBatch(2, stored=(StoredRun(None, prompt_hashes("xy")),), removed=prompt_hashes("uv"))
    assert index.apply(A, batch) is Trust.EXACT
    assert (found(index, "uv")["a"], found(index, "xy")["a"]) == (0, 2)


def test_what_is_told_twice_counts_once() -> None:
    index = index_of(a="uv", b="", c="")
    index.apply(A, stored("uv", sequence=1))  # seen already: ignored
    index.apply(A, stored("uvw", sequence=2))
    assert index.believed_blocks(A) == 3
    index.apply(A, KvBatch(3, removed=(*prompt_hashes("uvw")[2:], BlockHash(b"unknown"))))
    assert index.believed_blocks(A) == 2
    assert found(index, "uvw")["a"] == 2


def test_a_gap_makes_a_node_stale_until_the_replay_came() -> None:
    index = index_of(a="u", b="", c="")
    assert index.apply(A, stored("uvw", sequence=3)) is Trust.STALE
    assert (index.sequence(A), found(index, "uvw")["a"]) == (1, 1)  # what comes after a gap waits for the resync
    assert index.apply(A, stored("uv", sequence=2)) is Trust.STALE  # number 3 is known to be missing
    assert index.apply(A, stored("uvw", sequence=3)) is Trust.EXACT
    assert found(index, "uvw")["a"] == 3


def page(number: int, prompt: str, parent: str = "", more: bool = True, snapshot: int = 1, sequence: int = 5) -> KvBatch:
    """Return a page that goes on with a prompt after its first blocks."""
    run = StoredRun(prompt_hashes(parent)[-1] if parent else None, prompt_hashes(parent + prompt)[len(parent) :])
    return KvBatch(sequence, (run,), cleared=number == 0, snapshot=snapshot, page=number, more=more)


PAGES = (page(0, "uv"), page(1, "wx", "uv"), page(2, "yz", "uvwx", more=False))


def blind_index() -> KvIndex:
    index = KvIndex()
    for name in (A, B, C):
        index.add_node(name, blocks_max=10)
    return index


def test_pages_are_believed_in_part_until_the_last_one_came() -> None:
    index = blind_index()
    held = ((2, Trust.STALE), (4, Trust.STALE), (6, Trust.EXACT))
    for batch, (blocks, trust) in zip(PAGES, held, strict=True):
        assert index.apply(A, batch) is trust
        # Nothing but the whole is worth a number: who asks meanwhile must be told everything.
        assert index.sequence(A) == (5 if trust is Trust.EXACT else None)
        assert found(index, "uvwxyz")["a"] == blocks
    assert index.apply(A, KvBatch(6, removed=prompt_hashes("uvwxyz")[5:])) is Trust.EXACT
    assert found(index, "uvwxyz")["a"] == 5


@pytest.mark.parametrize(
    ("order", "held"),
    [
        ((0, 2), 2),  # the second is lost: the third says nothing of use
        ((0, 2, 1), 2),  # out of order: given up with the gap
        ((1, 2), 0),  # the first is lost
        ((2, 1, 0), 2),
        ((0, 1, 1), 4),  # a page twice is that page once, and the last is missing
    ],
)
def test_a_snapshot_with_a_page_missing_is_never_taken_for_the_whole(order: tuple[int, ...], held: int) -> None:
    index = blind_index()
    for number in order:
        assert index.apply(A, PAGES[number]) is not Trust.EXACT
    assert (index.sequence(A), found(index, "uvwxyz")["a"]) == (None, held)
    # Another snapshot mends it, whole.
    again = (page(0, "uv", snapshot=2), page(1, "12", "uv", more=False, snapshot=2))
    assert [index.apply(A, batch) for batch in again] == [Trust.STALE, Trust.EXACT]
    assert (found(index, "uvwxyz")["a"], found(index, "uv12")["a"]) == (2, 4)


def test_a_snapshot_supersedes_the_one_under_way() -> None:
    index = blind_index()
    index.apply(A, PAGES[0])
    index.apply(A, PAGES[1])
    index.apply(A, page(0, "rs", snapshot=2, sequence=7))
    assert index.apply(A, PAGES[2]) is Trust.STALE  # the former's last page: of no use any more
    assert index.apply(A, page(1, "t", "rs", more=False, snapshot=2, sequence=7)) is Trust.EXACT
    assert (found(index, "uvwxyz")["a"], found(index, "rst")["a"], index.sequence(A)) == (0, 3, 7)


def test_what_happened_during_a_snapshot_is_asked_for_after_it() -> None:
    index = blind_index()
    index.apply(A, PAGES[0])
    assert index.apply(A, stored("r", sequence=6)) is Trust.STALE  # between two pages: it would get lost
    index.apply(A, PAGES[1])
    assert index.apply(A, PAGES[2]) is Trust.STALE
    assert index.sequence(A) == 5  # all after that is missing
    assert index.apply(A, stored("r", sequence=6)) is Trust.EXACT


def test_a_snapshot_that_came_twice_makes_nobody_forget() -> None:
    index = blind_index()
    for batch in PAGES:
        index.apply(A, batch)
    applied = index.applied(A)
    for batch in (page(0, "uv", snapshot=2), page(1, "wxyz", "uv", more=False, snapshot=2)):
        assert index.apply(A, batch) is Trust.EXACT
    assert (found(index, "uvwxyz")["a"], index.applied(A)) == (6, applied)


def test_pages_that_claim_more_than_the_pool_end_the_snapshot() -> None:
    index = blind_index()
    index.apply(A, page(0, "abcdefgh"))
    assert index.apply(A, page(1, "ijklm", "abcdefgh")) is Trust.STALE
    assert index.apply(A, page(2, "n", "abcdefghijklm", more=False)) is Trust.STALE
    assert index.sequence(A) is None
    index.distrust(A)
    assert index.apply(A, page(3, "o", "n", more=False)) is Trust.BLIND
    index.validate()


def test_a_node_is_blind_until_it_starts_over() -> None:
    index = KvIndex()
    index.add_node(A, blocks_max=10)
    assert (index.trust(A), index.sequence(A)) == (Trust.BLIND, None)
    assert index.apply(A, stored("uv", sequence=7)) is Trust.BLIND
    assert index.blocks == 0
    assert index.apply(A, stored("uv", sequence=7, cleared=True)) is Trust.EXACT
    index.distrust(A)
    assert (index.trust(A), index.believed_blocks(A)) == (Trust.BLIND, 0)
    index.validate()


def test_starting_over_forgets_what_was_held_before() -> None:
    index = index_of(a="uvw", b="uv", c="")
    index.apply(A, stored("xy", sequence=9, cleared=True))
    assert found(index, "uvw") == {"a": 0, "b": 2, "c": 0}
    assert found(index, "xy")["a"] == 2
    assert index.apply(A, stored("uvw", sequence=8, cleared=True)) is Trust.EXACT  # an old one: ignored
    assert found(index, "uvw")["a"] == 0


def test_a_run_after_an_unknown_parent_asks_for_everything() -> None:
    index = index_of(a="u", b="uvw", c="")
    run = StoredRun(prompt_hashes("uvw")[-1], prompt_hashes("uvwx")[3:])
    assert index.apply(A, KvBatch(2, stored=(run,))) is Trust.STALE  # b holds the parent, a does not
    assert index.sequence(A) is None
    assert found(index, "uvwx") == {"a": 1, "b": 3, "c": 0}


def test_a_node_that_claims_more_than_its_pool_is_not_believed() -> None:
    index = KvIndex()
    index.add_node(A, blocks_max=2)
    assert index.apply(A, stored("uvw", cleared=True)) is Trust.STALE
    assert index.sequence(A) is None


def test_a_departed_node_is_cleaned_up_by_later_batches_and_its_slot_reused() -> None:
    index = index_of(a="uvw", b="uv", c="")
    column = index.column(A)
    index.remove_node(A)
    matches = index.find(prompt_hashes("uvw"))
    assert (matches.blocks(column), matches.blocks(index.column(B))) == (0, 2)  # at once, before any cleaning
    index.apply(B, stored("xy", sequence=2))
    assert index.blocks == 4  # u, v, x, y: w was held by nobody else
    index.add_node(A, blocks_max=10)
    assert index.column(A) == column
    assert found(index, "uvw") == {"a": 0, "b": 2, "c": 0}


class Model:
    """What the index should know, kept the plain way."""

    def __init__(self) -> None:
        self.held: dict[NodeId, dict[BlockHash, None]] = {}
        self.sequences: dict[NodeId, int] = {}

    def longest(self, node: NodeId, chain: tuple[BlockHash, ...]) -> int:
        return next((index for index, block in enumerate(chain) if block not in self.held[node]), len(chain))


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_match_a_plain_model(seed: int) -> None:
    generator = random.Random(seed)
    index, model = KvIndex(), Model()
    chains = [prompt_hashes(f"{generator.choice('rst') * generator.randrange(1, 30)}{number}{'x' * 40}") for number in range(12)]
    names = [NodeId(f"n{number}") for number in range(6)]
    for _ in range(150):
        node = generator.choice(names)
        if node not in model.held:
            index.add_node(node, blocks_max=10_000)
            index.apply(node, KvBatch(0, cleared=True))
            model.held[node], model.sequences[node] = {}, 0
        elif generator.random() < 0.05:
            index.remove_node(node)
            del model.held[node]
        else:
            change(generator, index, model, node, generator.choice(chains))
        index.validate()
        chain = generator.choice(chains)
        matches = index.find(chain)
        by_column = matches.by_column(index.columns)
        assert {name: by_column[index.column(name)] for name in model.held} == {
            name: model.longest(name, chain) for name in model.held
        }, f"seed {seed}"


def change(generator: random.Random, index: KvIndex, model: Model, node: NodeId, chain: tuple[BlockHash, ...]) -> None:
    """Let a node store more of a chain, drop the ends of what it holds, or start over."""
    held = model.held[node]
    model.sequences[node] += 1
    number = model.sequences[node]
    if generator.random() < 0.05:
        held.clear()
        index.apply(node, KvBatch(number, cleared=True))
        return
    removed: list[BlockHash] = []
    if generator.random() < 0.5:
        for _ in range(generator.randrange(20)):
            if held:
                removed.append(held.popitem()[0])  # the last stored has no child
    start = model.longest(node, chain)
    run = chain[start : start + generator.randrange(1, 40)]
    held.update(dict.fromkeys(run))
    stored_runs = (StoredRun(chain[start - 1] if start else None, run),) if run else ()
    assert index.apply(node, KvBatch(number, stored_runs, tuple(removed))) is Trust.EXACT


def test_siblings_find_what_the_first_is_about_to_compute() -> None:
    predicted = PredictedKv()
    predicted.add(A, RequestId(1), prompt_hashes("uvwx"), 1)
    assert predicted.extend(A, prompt_hashes("uvwyz"), present=1) == 3
    assert predicted.extend(A, prompt_hashes("uvwyz"), present=0) == 0  # its first block is neither held nor expected
    assert predicted.extend(B, prompt_hashes("uvwyz"), present=1) == 1
    assert predicted.extend(A, prompt_hashes("u"), present=1) == 1


def test_a_prediction_ends_with_its_request_unless_a_later_one_shares_it() -> None:
    predicted = PredictedKv()
    predicted.add(A, RequestId(1), prompt_hashes("uv"), 0)
    predicted.add(A, RequestId(2), prompt_hashes("uvw"), 0)
    predicted.remove(A, RequestId(1))
    assert predicted.extend(A, prompt_hashes("uvw"), present=0) == 3
    predicted.remove(A, RequestId(2))
    predicted.remove(A, RequestId(2))
    assert predicted.extend(A, prompt_hashes("uvw"), present=0) == 0
    assert predicted.nodes == ()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_expected_is_the_same_whether_it_was_looked_into_or_not(seed: int) -> None:
    generator = random.Random(seed)
    predicted = PredictedKv()
    expected: dict[RequestId, tuple[tuple[BlockHash, ...], int]] = {}
    prompts = [prompt_hashes(f"{letter}{number}" * 6) for letter in "ab" for number in range(3)]
    for number in range(200):
        if expected and generator.random() < 0.45:
            request = generator.choice(list(expected))
            predicted.remove(A, request)
            del expected[request]
        else:
            chain = generator.choice(prompts)
            held = {block for other, first in expected.values() for block in other[first:]}
            start = next((place for place in range(generator.randrange(4), 12) if chain[place] not in held), 12)
            if not held.intersection(chain[start:]):
                predicted.add(A, RequestId(number), chain, start)
                if start < 12:
                    expected[RequestId(number)] = chain, start
        held = {block for other, first in expected.values() for block in other[first:]}
        chain, place = generator.choice(prompts), generator.randrange(12)
        end = next((end for end in range(place, 12) if chain[end] not in held), 12)
        assert predicted.extend(A, chain, place) == end, f"seed {seed}"
    assert (predicted.nodes != ()) == bool(expected)
