"""What a node offers its host's store: cached blocks that have not been offered yet, parents first, so much at a time.

An offer claims the chain up to its end, so that nothing is written to while the store copies. What a store cannot take now (it
has no room, or it has forgotten what comes before) is offered again, from the start of the chain, when the chain is next used.
"""

from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.core.commands import Offer
from orchestrator.core.kvpool import BlockPool, Claim
from orchestrator.core.types import BlockHash, OfferId

#: Chains that wait to be offered; of more the one that has waited longest is left until it is used again.
CHAINS_MAX = 256


@dataclass(slots=True)
class Offered:
    """An offer that the store may be copying."""

    claim: Claim
    #: The chain's hashes up to the offer's end, and how many blocks of them are offered.
    hashes: tuple[BlockHash, ...]
    blocks: int
    #: When it was made.
    made_at: float
    #: True once it was asked to end.
    stopped: bool = False


class Offers:
    """The offers of one node, and the chains that are still to be offered."""

    def __init__(self, pool: BlockPool, blocks_max: int) -> None:
        self._pool = pool
        self._blocks_max = blocks_max
        self._serial = 0
        self._running: dict[OfferId, Offered] = {}
        #: Blocks in them.
        self._blocks = 0
        #: What is to be offered, by its last block, the chain that has waited longest first.
        self._chains: dict[BlockHash, tuple[BlockHash, ...]] = {}

    @property
    def claims(self) -> Collection[Claim]:
        """The claims of all running offers."""
        return [offered.claim for offered in self._running.values()]

    def add(self, hashes: tuple[BlockHash, ...]) -> None:
        """Let a chain of cached blocks be offered, as far as it was not."""
        if hashes:
            self._chains.pop(hashes[-1], None)
            self._chains[hashes[-1]] = hashes
        if len(self._chains) > CHAINS_MAX:
            del self._chains[next(iter(self._chains))]

    def next(self, now: float) -> Offer | None:
        """Return the next offer, or None if there is none or enough are running."""
        while self._chains and self._blocks < self._blocks_max:
            last, hashes = next(iter(self._chains.items()))
            matched = self._pool.match(hashes, len(hashes))
            start = self._pool.offered(hashes, matched)
            end = min(matched, start + self._blocks_max - self._blocks)
            if end == matched:
                del self._chains[last]
            if end > start:
                return self._begin(hashes, start, end, now)
        return None

    def _begin(self, hashes: tuple[BlockHash, ...], start: int, end: int, now: float) -> Offer:
        claim, blocks = self._pool.acquire(hashes, end)
        self._pool.mark_offered(hashes, end)
        self._serial += 1
        offer = OfferId(self._serial)
        self._running[offer] = Offered(claim, hashes[:end], end - start, now)
        self._blocks += end - start
        return Offer(offer, hashes[start - 1] if start else None, hashes[start:end], tuple(blocks[start:]))

    def end(self, offer: OfferId, complete: bool) -> None:
        """Release what an offer claimed; what the store has not got all of counts as not offered."""
        offered = self._running.pop(offer)
        self._blocks -= offered.blocks
        if not complete:
            self._pool.mark_offered(offered.hashes, len(offered.hashes), offered=False)
            for last, chain in list(self._chains.items()):
                if chain[: len(offered.hashes)] == offered.hashes:
                    del self._chains[last]
        self._pool.release(offered.claim)

    def stop(self, blocks_short: int, now: float) -> list[OfferId]:
        """Return the offers to be stopped so that so many blocks can be used again: none if that would not help.

        What was offered at this very moment is left until the next: most copies take no longer than that.
        """
        older = {offer: offered for offer, offered in self._running.items() if offered.made_at < now}
        running = [offer for offer, offered in older.items() if not offered.stopped]
        if not running or self._pool.kept_by([offered.claim for offered in older.values()]) < blocks_short:
            return []
        for offer in running:
            older[offer].stopped = True
        return running

    def validate(self) -> None:
        """Check that what is counted is what runs."""
        total = sum(offered.blocks for offered in self._running.values())
        assert self._blocks == total, f"{self._blocks} blocks are counted as offered, {total} are"
        assert total <= self._blocks_max, f"{total} blocks are offered, at most {self._blocks_max} may be"
        assert len(self._chains) <= CHAINS_MAX, f"{len(self._chains)} chains wait to be offered"
