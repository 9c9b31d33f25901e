"""Believes which node holds which KV blocks, and finds how long a prefix of a prompt each node holds.

A node's holdings are closed under prefix: it holds no block without holding all blocks before it. So along any chain of hashes
the sets of holders shrink, each contained in the one before, and the places where they change are found by bisection instead of
walking the chain:

    hashes    h0   h1   h2   h3   h4   h5   h6
    holders   ABC  ABC  ABC  AB   AB   -    -        levels: (3, ABC), (5, AB)

The index is a belief, not a truth: a wrong one costs a recompute or a fetch that brings less, never a failure. Each node numbers
what it tells; after a gap the node's holdings are believed only in part until a resync has mended them (`following.py`).

Rules for editors:

Rule 1: sets of nodes are ints, one bit a node, at its *column*, and what is stored is the complement: -1 (all bits) is "nobody".
    Larger sets are then smaller numbers, a chain's values ascend, and C's `bisect` can search them.
Rule 2: no Python-level loop over hashes where a bulk operation of dict, map or compress does it: hashes come by the thousand.
Rule 3: a column is given to a new node only when no block mentions its former owner any more.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

from orchestrator.core.cluster.following import Follower, Trust
from orchestrator.core.types import BlockHash, KvBatch, NodeId, RequestId, StoredRun

NOBODY = -1
#: Distinct sets of holders in one batch up to which each is looked for by a pass in C (measured by bench/index.py).
PARTS_MAX = 4
#: Chains expected of a node that are compared one by one before a table of their blocks is made.
NOTED_MAX = 4
#: Blocks cleaned of departed nodes with each batch: so many for every block it brings, and at least so many.
SWEEP_FACTOR = 4
SWEEP_BLOCKS_MIN = 256


@dataclass(frozen=True, slots=True)
class Matches:
    """How long a prefix of one chain each node holds."""

    #: (blocks, columns as a mask), fewest blocks first: these nodes hold at least so many. Each mask contains the next.
    levels: tuple[tuple[int, int], ...] = ()

    @property
    def blocks_max(self) -> int:
        """The longest prefix that any node holds, blocks."""
        return self.levels[-1][0] if self.levels else 0

    def within(self, columns: int) -> "Matches":
        """Return the same for some of the columns, given as a mask."""
        levels: list[tuple[int, int]] = []
        for blocks, mask in self.levels:
            held = mask & columns
            if held and levels and levels[-1][1] == held:
                levels[-1] = (blocks, held)
            elif held:
                levels.append((blocks, held))
        return Matches(tuple(levels))

    def blocks(self, column: int) -> int:
        """Return how many blocks of the chain the node in `column` holds."""
        for blocks, mask in reversed(self.levels):
            if mask >> column & 1:
                return blocks
        return 0

    def by_column(self, columns: int) -> list[int]:
        """Return the blocks held by each of the first `columns` columns. Costs little when most nodes share one depth."""
        within, depth = (1 << columns) - 1, 0
        longest, by = self.levels[-1] if self.levels else (0, within)
        if by & within == within:  # all hold as much
            return [longest] * columns
        groups: list[tuple[int, int]] = []
        for blocks, mask in self.levels:
            groups.append((depth, within & ~mask))
            within, depth = mask, blocks
        groups.append((depth, within))
        common = max(groups, key=lambda group: group[1].bit_count())
        present = [common[0]] * columns
        for group in groups:
            if group is not common:
                for column in columns_in(group[1]):
                    present[column] = group[0]
        return present


def columns_in(mask: int) -> Iterator[int]:
    """Yield the set bits of a mask, lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


class _Holders(dict[BlockHash, int]):
    """Complement of the holders' mask by block; a block that is not in here is held by nobody."""

    __slots__ = ()

    def __missing__(self, key: BlockHash) -> int:
        return NOBODY


class _Node(Follower):
    """What is believed of one node."""

    __slots__ = ("alone", "bit", "blocks", "blocks_max", "column")

    def __init__(self, column: int, blocks_max: int) -> None:
        super().__init__()
        self.move(column)
        self.blocks_max = blocks_max
        #: Blocks it is believed to hold.
        self.blocks = 0

    def move(self, column: int) -> None:
        """Give the node a column of which no block knows."""
        self.column = column
        self.bit = 1 << column
        #: What is stored for a block that only this node holds; one object, because comparing it with itself costs least.
        self.alone = ~self.bit


class KvIndex:
    """Which node holds which blocks, for the nodes of one model.

    Bounded: a node that claims more blocks than its pool has is no longer believed.
    """

    __slots__ = ("_columns", "_free", "_holders", "_nodes", "_retired", "_sweep", "_sweeping", "_swept")

    def __init__(self) -> None:
        self._holders = _Holders()
        self._nodes: dict[NodeId, _Node] = {}
        self._columns = 0
        #: Slots that no block mentions, for new nodes.
        self._free: list[int] = []
        #: Slots of departed nodes, as a mask, that blocks may still mention. Contains `_sweeping`.
        self._retired = 0
        #: Those of them that the sweep under way removes.
        self._sweeping = 0
        self._sweep: list[BlockHash] = []
        self._swept = 0

    @property
    def blocks(self) -> int:
        """Distinct blocks in the index."""
        return len(self._holders)

    @property
    def columns(self) -> int:
        """Columns ever used at one time: every column is below."""
        return self._columns

    def column(self, node: NodeId) -> int:
        """Return the bit that stands for a node in the masks of `Matches`."""
        return self._nodes[node].column

    def trust(self, node: NodeId) -> Trust:
        """Return how far a node's holdings are believed now."""
        return self._nodes[node].trust

    def sequence(self, node: NodeId) -> int | None:
        """Return the last batch applied of a node, which a resync is to follow; None if all must be told anew."""
        return self._nodes[node].sequence

    def applied(self, node: NodeId) -> int:
        """Return how many batches of a node were taken in: a resync that makes this grow is under way."""
        return self._nodes[node].applied

    def believed_blocks(self, node: NodeId) -> int:
        """Return how many blocks a node is believed to hold."""
        return self._nodes[node].blocks

    def add_node(self, node: NodeId, blocks_max: int) -> None:
        """Start to follow a node of which nothing is known; `blocks_max` is the size of its pool."""
        assert node not in self._nodes, f"{node} is in the index already"
        self._nodes[node] = _Node(self._take_slot(), blocks_max)

    def remove_node(self, node: NodeId) -> None:
        """Forget a node and all it holds. The blocks are cleaned up bit by bit as later batches come."""
        self._retire(self._nodes.pop(node))

    def distrust(self, node: NodeId) -> None:
        """Forget what a node holds; from now on only a batch that starts over is believed."""
        entry = self._nodes[node]
        self._clear(entry)
        entry.distrust()

    def find(self, hashes: Sequence[BlockHash]) -> Matches:
        """Return how long a prefix of the chain `hashes` each node holds.

        Each level's end is looked for within twice the length of the level before, then in all the rest.
        """
        key: Callable[[BlockHash], int] = self._holders.__getitem__
        if self._retired:
            key = self._value_without_retired
        end = len(hashes)
        value = key(hashes[0]) if end else NOBODY
        if value == NOBODY:
            return Matches()
        if key(hashes[-1]) == value:
            return Matches(((end, ~value),))
        levels: list[tuple[int, int]] = []
        start, length = 0, end
        while value != NOBODY:
            near = start + 2 * length
            within = near if near < end and key(hashes[near]) != value else end
            stop = bisect_right(hashes, value, start + 1, within, key=key)
            levels.append((stop, ~value))
            start, length = stop, stop - start
            value = key(hashes[stop]) if stop < end else NOBODY
        return Matches(tuple(levels))

    def _value_without_retired(self, block: BlockHash) -> int:
        return self._holders[block] | self._retired

    def apply(self, node: NodeId, batch: KvBatch) -> Trust:
        """Take in what a node says of its holdings; anything but EXACT afterwards asks for a resync after `sequence`."""
        entry = self._nodes[node]
        if self._retired:
            self._clean(max(SWEEP_BLOCKS_MIN, SWEEP_FACTOR * batch.blocks))
        if entry.follows(batch):
            if batch.cleared:
                self._clear(entry)
            if batch.removed:
                self._remove(entry, batch.removed)
            believable = True
            for run in batch.stored:
                if not self._store(entry, run):
                    believable = False
                    break
            entry.take(batch, believable)
        return entry.trust

    def validate(self) -> None:
        """Check every invariant against every block. Raises `AssertionError`; for tests, as it walks the whole index."""
        counts = [0] * self._columns
        for block, value in self._holders.items():
            assert value < NOBODY, f"{block!r} is kept though nobody holds it"
            for column in columns_in(~value):
                counts[column] += 1
        for name, node in self._nodes.items():
            assert counts[node.column] == node.blocks, f"{name} holds {counts[node.column]} blocks, not {node.blocks}"
            assert not node.bit & self._retired, f"{name} has the column {node.column} of a departed node"
        for column in self._free:
            assert counts[column] == 0, f"free column {column} is mentioned by {counts[column]} blocks"
        used = sorted([node.column for node in self._nodes.values()] + self._free + list(columns_in(self._retired)))
        assert used == list(range(self._columns)), f"columns {used} are not 0 to {self._columns - 1}"

    def _store(self, node: _Node, run: StoredRun) -> bool:
        """Note blocks as held; False if that cannot be: their parent is not held, or there are more than fit the pool.

        Blocks are nearly always new to the index: they are put in and asked for in one pass, and only those that were there
        already are gone through again.
        """
        bit, holders = node.bit, self._holders
        if run.parent is not None and holders[run.parent] & bit:
            return False
        before = len(holders)
        values = list(map(holders.setdefault, run.hashes, repeat(node.alone)))
        node.blocks += len(holders) - before
        if values.count(node.alone) < len(values):
            for value, members in _by_value(run.hashes, values):
                if value & bit:
                    holders.update(zip(members, repeat(value & ~bit)))
                    node.blocks += len(set(members))
        return node.blocks <= node.blocks_max

    def _remove(self, node: _Node, hashes: Sequence[BlockHash]) -> None:
        """Note blocks as not held. Those that nobody else holds are taken out in the pass that asks for them, if all are such."""
        bit, holders, alone = node.bit, self._holders, node.alone
        if holders[hashes[0]] == holders[hashes[-1]] == alone:
            values = list(map(holders.pop, hashes, repeat(NOBODY)))
            if values.count(alone) == len(values):
                node.blocks -= len(values)
                return
        else:
            values = list(map(holders.__getitem__, hashes))
        for value, members in _by_value(hashes, values):
            if value == NOBODY:
                continue
            if not value & bit:
                node.blocks -= len(members)
            if value | bit == NOBODY:
                self._delete(members)
            else:
                holders.update(zip(members, repeat(value | bit)))
        assert node.blocks >= 0, f"column {node.column} holds {node.blocks} blocks of {len(holders)}"

    def _delete(self, members: Sequence[BlockHash]) -> int:
        before = len(self._holders)
        deque(map(self._holders.pop, members, repeat(None)), maxlen=0)
        return before - len(self._holders)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._columns += 1
        return self._columns - 1

    def _clear(self, node: _Node) -> None:
        """Let a node hold nothing, under a column that no block mentions."""
        if node.blocks:
            self._retire(node)
            node.move(self._take_slot())
            node.blocks = 0

    def _retire(self, node: _Node) -> None:
        if not node.blocks:
            self._free.append(node.column)
            return
        self._retired |= node.bit
        if not self._sweeping:
            self._start_sweep()

    def _start_sweep(self) -> None:
        self._sweeping = self._retired
        self._sweep = list(self._holders)
        self._swept = 0

    def _clean(self, count: int) -> None:
        """Remove departed nodes from the next `count` blocks; blocks stored meanwhile never mention them (rule 3)."""
        chunk = self._sweep[self._swept : self._swept + count]
        self._swept += len(chunk)
        for value, members in _by_value(chunk, list(map(self._holders.__getitem__, chunk))):
            cleaned = value | self._sweeping
            if cleaned == NOBODY:
                self._delete(members)
            elif cleaned != value:
                self._holders.update(zip(members, repeat(cleaned)))
        if self._swept == len(self._sweep):
            self._end_sweep()

    def _end_sweep(self) -> None:
        self._free.extend(columns_in(self._sweeping))
        self._retired &= ~self._sweeping
        self._sweeping = 0
        self._sweep = []
        if self._retired:
            self._start_sweep()


def _by_value(hashes: Sequence[BlockHash], values: list[int]) -> list[tuple[int, Sequence[BlockHash]]]:
    """Return blocks by their value. Nearly always each value's are neighbours, and there are only a few values."""
    parts: list[tuple[int, Sequence[BlockHash]]] = []
    start = 0
    while start < len(values) and len(parts) < PARTS_MAX:
        value = values[start]
        end = start + values.count(value)
        if end - start > 1 and values[start:end].count(value) < end - start:
            break
        parts.append((value, hashes[start:end]))
        start = end
    if start == len(values):
        return parts
    groups: dict[int, list[BlockHash]] = {value: [] for value in dict.fromkeys(values)}
    for value, block in zip(values, hashes, strict=True):
        groups[value].append(block)
    return list(groups.items())


class _Expected:
    """What one node is expected to hold soon."""

    __slots__ = ("blocks", "noted", "requests")

    def __init__(self) -> None:
        #: Block to the last request that is about to compute it there; without those of `noted`.
        self.blocks: dict[BlockHash, RequestId] = {}
        #: Chains that nobody has looked into yet: request, the chain, and the first of its blocks that is expected.
        self.noted: dict[RequestId, tuple[Sequence[BlockHash], int]] = {}
        #: Requests of which something is expected.
        self.requests = 0

    def has(self, hashes: Sequence[BlockHash], place: int) -> bool:
        """Return whether a chain's block is expected; in a noted chain it would be at the same place."""
        block = hashes[place]
        if block in self.blocks:
            return True
        return block in [chain[place] for chain, start in self.noted.values() if start <= place < len(chain)]

    def look_into(self) -> None:
        """Make a table of all that is expected."""
        for request, (chain, start) in self.noted.items():
            self.blocks.update(dict.fromkeys(chain[start:], request))
        self.noted.clear()


class PredictedKv:
    """Blocks that nodes do not hold yet but are about to compute for requests under way.

    A burst of siblings arrives before the first of them is computed; sent where the first went, they share its work. A request
    is noted with the part of its prompt that its node did not hold; that part goes when its first token comes, by when the
    node has told of the blocks itself. Most prompts have no sibling: a table of their blocks is made only for those that do.
    """

    __slots__ = ("_by_node", "_by_request")

    def __init__(self) -> None:
        self._by_node: dict[NodeId, _Expected] = {}
        #: A request's chain and the first of its blocks that is expected of a node.
        self._by_request: dict[tuple[NodeId, RequestId], tuple[Sequence[BlockHash], int]] = {}

    @property
    def nodes(self) -> Sequence[NodeId]:
        """Nodes of which anything is predicted."""
        return tuple(self._by_node)

    def add(self, node: NodeId, request: RequestId, hashes: Sequence[BlockHash], start: int) -> None:
        """Expect a node to hold the blocks that it is to compute for a request: those of its chain from `start` on."""
        if start >= len(hashes):
            return
        expected = self._by_node.get(node)
        if expected is None:
            expected = self._by_node[node] = _Expected()
        elif len(expected.noted) >= NOTED_MAX:
            expected.look_into()
        self._by_request[node, request] = expected.noted[request] = hashes, start
        expected.requests += 1

    def remove(self, node: NodeId, request: RequestId) -> None:
        """Expect nothing more of a request on a node; unknown ones are ignored."""
        noted = self._by_request.pop((node, request), None)
        if noted is None:
            return
        expected = self._by_node[node]
        expected.requests -= 1
        if not expected.requests:  # most often: nothing else is under way there
            del self._by_node[node]
        elif expected.noted.pop(request, None) is None:
            hashes, start = noted
            blocks = expected.blocks
            for block in hashes[start:]:
                if blocks.get(block) == request:
                    del blocks[block]

    def extend(self, node: NodeId, hashes: Sequence[BlockHash], present: int) -> int:
        """Return how many blocks of a chain a node is about to hold, given that it holds the first `present` already."""
        expected = self._by_node.get(node)
        if expected is None or present >= len(hashes) or not expected.has(hashes, present):
            return present
        expected.look_into()
        blocks = expected.blocks
        return bisect_left(hashes, True, present, key=lambda block: block not in blocks)
