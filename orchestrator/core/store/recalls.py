"""Brings chains into the arena, for nodes that read them and for prompts that are expected; or has nodes read them by themselves.

    ReadOpened    what is in the arena is claimed and served at once
                  .. ReadCmx for each segment behind it, in order, as far as bytes under way and slots allow
                  .. CmxRead: the segment is cached after the one before it, served
                  .. the last one, or the first that failed: ServeSlots(final) .. ReadClosed: the claim is given up
                  of those in the background nothing more is asked for while another waits its turn
    ReadOpened    by a node that can read segments by itself: what is in the arena is served as ever
      (direct)    .. ServeSegment for each segment behind it, as far as bytes under way allow
                  .. SegmentRead: the node has its blocks; what it did not want of them went nowhere
                  .. the last one, or the first that failed: ServeSlots(final), without slots .. ReadClosed
    PrefetchAsked the first way, served to nobody, for segments that are known to be in cmx; not while a read waits its turn

Rules for editors.

Rule 1: what was served stays claimed until the read is closed.
Rule 2: slots that a move may write to are free once it has ended, never before.
Rule 3: what a node reads by itself has no slots and no room in the arena; the store need not wait for it, nor does it learn from
it what is in the arena.
Rule 4: an unfinished recall waits for a move that runs, or for bytes or slots that something running will set free; else it ends.
"""

from collections.abc import Sequence

from orchestrator.core.commands import DeleteCmx, ServeSlots, StoreCommand
from orchestrator.core.events import ReadOpened, SegmentRead
from orchestrator.core.kvpool import Claim
from orchestrator.core.store.moves import Moves
from orchestrator.core.store.shelves import Move, Recall, Shelf
from orchestrator.core.types import BlockHash, BlockId, ExportId, MoveFailure, NodeId, SlotId

#: Reads at once; one more is given nothing, and computes its prompt.
READS_MAX = 1024
#: Prompts that are brought on advice at once; further advice is not followed.
PREFETCHES_MAX = 64
#: Bytes that are served as one portion: a reader goes on with its prompt from portion to portion.
PORTION_BYTES = 32 << 20


class Recalls:
    """All reads, and all chains that are on their way into the arena."""

    __slots__ = ("_moves", "_orders", "_prefetches", "_reads", "_waiting")

    def __init__(self, moves: Moves, orders: list[StoreCommand]) -> None:
        self._moves = moves
        self._orders = orders
        self._reads: dict[ExportId, Recall] = {}
        #: Those of them that wait for blocks from cmx, and chains that nobody reads yet; each the first come first.
        self._waiting: dict[Recall, None] = {}
        self._prefetches: dict[Recall, None] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is to come from cmx."""
        return bool(self._waiting or self._prefetches)

    # --- reads ------------------------------------------------------------------------------------------------------------

    def open(self, shelf: Shelf, read: ReadOpened, now: float) -> None:
        """Serve what is in the arena of a prompt, and fetch the rest as far as it may be in cmx."""
        assert read.read not in self._reads, f"read {read.read} is open already"
        end = min(read.tokens // shelf.model.block_tokens, len(read.hashes))
        if end <= read.first_block or len(self._reads) >= READS_MAX or not shelf.agrees(read.hashes, end):
            self.refuse(read, shelf.model.block_tokens)
            return
        recall = self._reads[read.read] = self._recall(shelf, read.hashes, end, read)
        self._climb(recall)
        shelf.count("cpu_hits", max(0, min(recall.depth, end) - read.first_block))
        size = shelf.model.segment_blocks
        recall.end = min(recall.end, max(recall.depth, len(read.hashes) // size * size if self._reachable(shelf) else 0))
        if read.direct:
            recall.direct, recall.came = True, max(recall.depth, read.first_block)
            recall.asked = recall.came // size
        self._waiting[recall] = None
        self._go_on(recall, now)

    def refuse(self, read: ReadOpened, block_tokens: int) -> None:
        """End a read that gets nothing."""
        self._orders.append(ServeSlots(read.read, (), read.first_block * block_tokens, final=True))

    def read(self, identity: ExportId, slots: int, now: float) -> None:
        """Note that a node has its copy of slots; a read that was closed meanwhile is ignored."""
        recall = self._reads.get(identity)
        if recall is None:
            return
        shelf = recall.shelf
        self._copied(recall, slots, now, copied=True)
        shelf.count("given", slots)

    def segment_read(self, event: SegmentRead, now: float) -> None:
        """Note that a node has a segment, or why not; one that was given up meanwhile is ignored."""
        recall = self._reads.get(event.read)
        move = recall.moves.get(event.number) if recall is not None else None
        if recall is None or move is None:
            return
        shelf = recall.shelf
        assert move.direct, f"segment {event.number} is brought into the arena"
        self._moves.end(move.id, event.failure, now)
        if event.failure is not None:
            move.cancelled = True
            self._lost(move, event.failure, now)
            return
        first = next(iter(recall.moves))
        assert event.number == first, f"segment {event.number} was read before {first}"
        del recall.moves[event.number], move.recalls[recall]
        shelf.segments.add(shelf.model.model, move.segment, move.parent)
        end = min(recall.end, (event.number + 1) * shelf.model.segment_blocks)
        shelf.count("cmx_hits", end - recall.came)
        shelf.count("given", end - recall.came)
        recall.came = end
        self._go_on(recall, now)

    def close(self, identity: ExportId, now: float) -> None:
        """Give up what a read claims."""
        recall = self._reads.pop(identity, None)
        if recall is not None:
            self._leave(recall, now)
            recall.shelf.pool.release(recall.claim)

    def detach(self, node: NodeId, now: float) -> list[tuple[Shelf, Claim]]:
        """End all reads of a node; return their claims, which it may still be copying from, each a user of its shelf."""
        gone = [recall for recall in self._reads.values() if recall.read is not None and recall.read.node == node]
        for recall in gone:
            assert recall.read is not None
            del self._reads[recall.read.read]
            self._leave(recall, now)
            recall.shelf.users += 1
        return [(recall.shelf, recall.claim) for recall in gone]

    def _leave(self, recall: Recall, now: float) -> None:
        """Let a recall wait for nothing more, and count its reader out."""
        self._waiting.pop(recall, None)
        self._forsake(recall)
        if recall.in_flight:
            self._copied(recall, recall.in_flight, now, copied=False)
        if recall.final:
            recall.shelf.users -= 1
        recall.final = False

    def _copied(self, recall: Recall, slots: int, now: float, copied: bool) -> None:
        """Count slots out that were served."""
        shelf = recall.shelf
        recall.in_flight -= slots
        assert recall.in_flight >= 0, f"{-recall.in_flight} slots were read that were not served"
        shelf.cpu.end(now, slots * shelf.model.block_bytes if copied else 0, slots)
        if not recall.in_flight and not recall.final:
            shelf.users -= 1

    def _serve(self, recall: Recall, final: bool, now: float) -> None:
        """Hand the reader what it has not got of what is in the arena, in portions."""
        shelf, read = recall.shelf, recall.read
        assert read is not None, "nobody reads"
        depth, size = recall.claim.depth, shelf.model.block_tokens
        end = max(recall.served, min(depth, recall.end))
        slots: list[BlockId] = []
        if end > recall.served:
            slots = shelf.pool.tail(recall.claim, depth - recall.served)[1][: end - recall.served]
            shelf.note_read(recall.hashes[recall.served : end])
        elif not final:
            return
        if not recall.in_flight:
            shelf.users += 1
        portion = max(1, PORTION_BYTES // shelf.model.block_bytes)
        for start in range(0, max(1, len(slots)), portion):
            part = slots[start : start + portion]
            recall.served += len(part)
            recall.in_flight += len(part)
            last = final and recall.served == end
            tokens = max(recall.served, recall.came if last else 0) * size
            self._orders.append(ServeSlots(read.read, tuple(map(SlotId, part)), tokens, last))
        shelf.cpu.begin(now, len(slots))
        recall.final = final

    # --- chains on their way ----------------------------------------------------------------------------------------------

    def prefetch(self, shelf: Shelf, hashes: Sequence[BlockHash], blocks: int, now: float) -> None:
        """Bring a chain into the arena as far as its segments are known to be in cmx."""
        if len(self._prefetches) >= PREFETCHES_MAX:
            shelf.fail("too many prefetches")
            return
        end = min(blocks, len(hashes))
        if not shelf.agrees(hashes, end):
            return
        recall = self._recall(shelf, hashes, end, None)
        self._climb(recall)
        number = recall.depth // shelf.model.segment_blocks
        while self._known(shelf, shelf.segment(hashes, number)) and self._reachable(shelf):
            number += 1
        recall.end = min(recall.end, max(recall.depth, number * shelf.model.segment_blocks))
        self._prefetches[recall] = None
        self._go_on(recall, now)

    @staticmethod
    def _known(shelf: Shelf, segment: BlockHash | None) -> bool:
        return segment is not None and shelf.segments.holds(shelf.model.model, segment)

    def _reachable(self, shelf: Shelf) -> bool:
        return shelf.model.cmx and not self._moves.paused

    @staticmethod
    def _recall(shelf: Shelf, hashes: Sequence[BlockHash], end: int, read: ReadOpened | None) -> Recall:
        claim = shelf.pool.claim(None)
        assert claim is not None
        return Recall(shelf, hashes, end, claim, read)

    def _climb(self, recall: Recall) -> None:
        """Claim what is in the arena, and what has arrived and follows on it."""
        shelf, claim, hashes = recall.shelf, recall.claim, recall.hashes
        while not recall.over:
            if shelf.pool.holds(hashes[claim.depth]):
                held = shelf.pool.match(hashes, recall.end)
                if not shelf.pool.ends(hashes[held - 1], held):
                    recall.end = claim.depth  # elsewhere than its reader says: no chain
                    break
                shelf.pool.extend(claim, hashes[held - 1], held)
            segment = shelf.segment(hashes, claim.depth // shelf.model.segment_blocks)
            move = shelf.arriving.get(segment) if segment is not None and not recall.over else None
            if move is None or not move.arrived:
                break
            if not self._follows(recall):
                recall.end = claim.depth
                break
            self._shelve(recall, move)
        recall.asked = max(recall.asked, claim.depth // shelf.model.segment_blocks)
        for number in [number for number in recall.moves if (number + 1) * shelf.model.segment_blocks <= claim.depth]:
            self._forsake_move(recall, number)

    @staticmethod
    def _follows(recall: Recall) -> bool:
        """Tell whether the rest of a segment can follow on what is claimed: in a true chain nothing of it is held yet."""
        shelf, depth, size = recall.shelf, recall.depth, recall.shelf.model.segment_blocks
        names = recall.hashes[depth : depth - depth % size + size]
        return shelf.new_blocks(names) == len(names)

    def _shelve(self, recall: Recall, move: Move) -> None:
        """Cache a segment that has arrived behind what is claimed."""
        shelf, size = recall.shelf, recall.shelf.model.segment_blocks
        depth = recall.depth
        offset = depth % size
        shelf.pool.give_back(move.slots[:offset])
        shelf.store(recall.claim, move.slots[offset:], recall.hashes[depth : depth - offset + size])
        move.slots = []
        del shelf.arriving[move.segment]
        if recall.read is not None:
            shelf.count("cmx_hits", size - offset)
        else:
            shelf.count("prefetched", size - offset)
            shelf.note_prefetched(recall.hashes[depth : depth - offset + size])

    def _go_on(self, recall: Recall, now: float) -> None:
        """Serve what has come; end the recall if that is all."""
        over = recall.over
        if over:
            self._waiting.pop(recall, None)
            self._prefetches.pop(recall, None)
            self._forsake(recall)
            shelf = recall.shelf
            if shelf.model.cmx:
                shelf.segments.use(shelf.model.model, shelf.whole(recall.hashes, recall.depth))
        if recall.read is not None:
            self._serve(recall, over, now)
            if over:
                had = max(recall.served, recall.came, min(recall.wanted, recall.read.first_block))
                recall.shelf.count("misses", recall.wanted - had)
        elif over:
            recall.shelf.pool.release(recall.claim)

    def _forsake(self, recall: Recall) -> None:
        """Let a recall wait for no move."""
        for number in list(recall.moves):
            self._forsake_move(recall, number)

    def _forsake_move(self, recall: Recall, number: int) -> None:
        """Let a recall not wait for a move; one that nobody waits for is given up."""
        move = recall.moves.pop(number)
        del move.recalls[recall]
        if move.recalls:
            return
        if move.shelf.arriving.get(move.segment) is move:
            del move.shelf.arriving[move.segment]
        if move.arrived:
            move.shelf.pool.give_back(move.slots)
            move.slots = []
        else:
            self._moves.cancel(move)

    # --- moves ------------------------------------------------------------------------------------------------------------

    def proceed(self, now: float) -> None:
        """Ask for as much as may be under way: for reads first, for what is only advised when no read wants more."""
        self._ask_all(now)
        while (recall := self._stuck()) is not None:
            recall.shelf.fail("no room")
            self._break(recall, recall.depth, now)
            self._ask_all(now)

    def _stuck(self) -> Recall | None:
        """Return a recall that waits though nothing runs that would let it go on (rule 4)."""
        if self._moves.running:
            return None
        waiting = sorted(self._waiting or self._prefetches, key=lambda recall: recall.background)
        return next((recall for recall in waiting if not recall.moves and not recall.shelf.users), None)

    def _ask_all(self, now: float) -> None:
        for recall in [recall for recall in self._waiting if not recall.background]:
            self._ask(recall, False, now)
        if all(self._all_asked(recall) for recall in self._waiting if not recall.background):
            for recall in [*(recall for recall in self._waiting if recall.background), *self._prefetches]:
                self._ask(recall, True, now)

    @staticmethod
    def _all_asked(recall: Recall) -> bool:
        return recall.asked * recall.shelf.model.segment_blocks >= recall.end

    def _ask(self, recall: Recall, background: bool, now: float) -> None:
        """Wait for the next segments of a chain, and start their moves, as far as bytes and slots allow."""
        shelf = recall.shelf
        size = shelf.model.segment_blocks
        while not self._all_asked(recall):
            number = recall.asked
            segment = shelf.segment(recall.hashes, number)
            assert segment is not None, f"segment {number} of a chain of {len(recall.hashes)} blocks is asked for"
            move = shelf.arriving.get(segment) if not recall.direct else None
            if move is None:
                if not self._moves.room(shelf, background) or (not recall.direct and shelf.pool.available_blocks < size):
                    return
                move = self._start(recall, segment, now)
            recall.asked += 1
            recall.moves[number] = move
            move.recalls[recall] = None
            if move.arrived and number * size <= recall.depth:
                self._climb(recall)
                self._go_on(recall, now)

    def _start(self, recall: Recall, segment: BlockHash, now: float) -> Move:
        """Have the next segment of a chain brought: into slots, or by its reader."""
        shelf, number = recall.shelf, recall.asked
        parent = shelf.segment(recall.hashes, number - 1) if number else None
        if recall.direct:
            assert recall.read is not None, "nobody reads"
            tokens = min(recall.end, (number + 1) * shelf.model.segment_blocks) * shelf.model.block_tokens
            return self._moves.serve(shelf, recall.read.read, segment, parent, number, tokens, now)
        move = self._moves.read(shelf, segment, parent, shelf.pool.allocate(shelf.model.segment_blocks), now)
        shelf.arriving[segment] = move
        return move

    def arrived(self, move: Move, failure: MoveFailure | None, now: float) -> None:
        """Go on with whoever waited for a segment, or end that where it is missing."""
        shelf = move.shelf
        if move.cancelled or failure is not None:
            shelf.pool.give_back(move.slots)
            move.slots = []
        if move.cancelled:
            return
        if failure is not None:
            move.cancelled = True
            self._lost(move, failure, now)
            return
        move.arrived = True
        shelf.count("recalled", shelf.model.segment_blocks)
        shelf.segments.add(shelf.model.model, move.segment, move.parent)
        for recall in list(move.recalls):
            self._climb(recall)
            self._go_on(recall, now)

    def late(self, move: Move, now: float) -> None:
        """Give up a move that takes too long."""
        self._end_waiting(move, now)

    def _lost(self, move: Move, failure: MoveFailure, now: float) -> None:
        """Forget a segment that is not there, and end whoever waited for it."""
        shelf = move.shelf
        shelf.fail(failure.value)
        if failure in (MoveFailure.MISSING, MoveFailure.DAMAGED):
            shelf.segments.remove(shelf.model.model, move.segment)
        if failure is MoveFailure.DAMAGED:
            self._orders.append(DeleteCmx(shelf.model.model, (move.segment,)))
        self._end_waiting(move, now)
        if failure is MoveFailure.UNAVAILABLE:
            self._moves.pause(now)
            for recall in [*self._waiting, *self._prefetches]:  # nothing more is asked for
                self._break(recall, recall.asked * recall.shelf.model.segment_blocks, now)

    def _end_waiting(self, move: Move, now: float) -> None:
        """End whoever waits for a move where it would have gone on."""
        if move.shelf.arriving.get(move.segment) is move:
            del move.shelf.arriving[move.segment]
        for recall in list(move.recalls):
            number = next(number for number, one in recall.moves.items() if one is move)
            self._break(recall, number * move.shelf.model.segment_blocks, now)

    def _break(self, recall: Recall, end: int, now: float) -> None:
        """Let a chain come no further than to a block; what is there already counts."""
        recall.end = min(recall.end, max(recall.depth, end))
        for number in [number for number in recall.moves if number * recall.shelf.model.segment_blocks >= recall.end]:
            self._forsake_move(recall, number)
        self._go_on(recall, now)

    # --- what others ask --------------------------------------------------------------------------------------------------

    def waiting(self, shelf: Shelf) -> tuple[int, int]:
        """Return how many reads of a model that requests wait for wait for blocks from cmx, and for how many blocks."""
        waiting = [recall for recall in self._waiting if recall.shelf is shelf and not recall.background]
        return len(waiting), sum(recall.end - recall.depth for recall in waiting)

    def held(self) -> tuple[list[tuple[Shelf, Claim]], list[tuple[Shelf, BlockId]]]:
        """Return all claims, and all slots that moves write to, or wrote."""
        recalls = dict.fromkeys([*self._reads.values(), *self._prefetches])
        moves = dict.fromkeys(move for recall in recalls for move in recall.moves.values())
        moves.update(dict.fromkeys(self._moves.running.values()))
        return [(recall.shelf, recall.claim) for recall in recalls], [(move.shelf, slot) for move in moves for slot in move.slots]

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers."""
        for recall in [*self._waiting, *self._prefetches]:
            assert not recall.over, f"a chain of {recall.depth} blocks is over at {recall.end} and still waits"
            runs = any(not move.arrived for move in recall.moves.values())
            assert runs or self._moves.running or recall.shelf.users or self._waiting, f"nothing brings block {recall.depth}"
            for number, move in recall.moves.items():
                assert recall in move.recalls, f"segment {number} is waited for, and its move does not know"
                comes = move.id in self._moves.running if move.direct else move.shelf.arriving.get(move.segment) is move
                assert comes, f"segment {number} is waited for and does not come"
                assert move.direct == recall.direct, f"segment {number} comes where it is not waited for"
        for identity, recall in self._reads.items():
            assert recall.final or recall in self._waiting, f"read {identity} is neither final nor waits"
            assert recall.in_flight <= recall.served, f"read {identity}: {recall.in_flight} in flight, {recall.served} served"
