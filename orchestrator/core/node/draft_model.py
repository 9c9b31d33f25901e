"""What a node knows of its draft model: how many passes pay in a step, and what it may read.

A pass brings one token for each sequence that takes part, and takes about as long however many do. So it is decided for all of
them: there is one more pass while what it is likely to bring to all together, rows paid, is more than it costs. Before its first
draft for a sequence the model has to read what came before. That is paid for out of a purse: a share of what the node generates,
and what drafts have brought.
"""

from collections.abc import Sequence

from orchestrator.core.node.drafting import (
    RETRY_AFTER_MAX,
    RETRY_AFTER_MIN,
    SLOWER_MAX,
    TRIES_FREE,
    TRIES_SHARE,
    Drafting,
    DraftKind,
    Price,
    SequenceDrafts,
)

#: Tokens that a draft model's reading may cost before its drafts have brought any, and most that they can bring in advance; the
#: share of a node's tokens that it may cost whatever they bring.
PURSE_TOKENS = 256.0
READING_SHARE = 0.005
#: Weight of the newest step in the share of sequences for which nothing is found.
LEFT_WEIGHT = 0.1


class DraftModel:
    """What a node knows of its draft model."""

    __slots__ = (
        "_again_at", "_asked", "_drafted", "_found", "_left", "_lost", "_passes", "_probe", "_probed_at", "_retry_after",
        "_shares", "_steps", "_tries", "purse", "wishes",
    )  # fmt: skip

    def __init__(self, tokens_max: int) -> None:
        #: What sequences would have drafted by it if passes cost nothing.
        self.wishes = DraftKind(tokens_max)
        #: By number of sequences, rounded down to a power of two: what share of a step without drafts a pass takes.
        self._shares: dict[int, Price] = {}
        #: Steps of the node, the one from which drafting is tried again where it does not pay, and how much later it is the next
        #: time; whether the step under way is such a try; and tokens that those have cost.
        self._steps = 0
        self._again_at = 0
        self._retry_after = RETRY_AFTER_MIN
        self._tries = False
        self._lost = 0.0
        #: Tokens that reading may cost now.
        self.purse = PURSE_TOKENS
        #: The sequence that probes, if one does, and the step in which it did last.
        self._probe: SequenceDrafts | None = None
        self._probed_at = 0
        #: What share of the sequences that would take part is left when something is found for some, lately.
        self._left = 1.0
        #: Of the step whose results are being noted: sequences that would have taken part, and those for which something was
        #: found; passes, and drafted tokens that were right less what rows cost.
        self._asked = 0
        self._found = 0
        self._passes = 0
        self._drafted = 0.0

    def may_read(self, drafts: SequenceDrafts, drafting: Drafting) -> bool:
        """Return whether what came before may be read for a sequence.

        It may while the purse is not empty and drafts are likely to pay; else for one at a time, and no sooner than the purse is
        full again, so that it is noticed when they do.
        """
        drafts.probing = False
        if drafting.chance > self.wishes.price:
            return self.purse > 0.0
        if self._probe is not drafts:
            if self.purse < PURSE_TOKENS or (self._probe is not None and self._steps <= self._probed_at + 1):
                return False
            self._probe = drafts
        self._probed_at = self._steps
        drafts.probing = True
        return True

    def passes_for(self, drafts: Sequence[tuple[Drafting, int]], sequences: int, expected: float, generated: int) -> int:
        """Return how many passes there may be in a step.

        Args:
            drafts: of the sequences that would take part, with the tokens that each would have.
            sequences: those that decode, all of them.
            expected: what share of a step without drafts a pass takes, if none was measured.
            generated: tokens that the node has generated.
        """
        self._steps += 1
        self._tries = False
        gains: list[float] = []
        for drafting, wish in drafts:
            gains += [0.0] * (wish - len(gains))
            chance = 1.0
            for place in range(wish):
                chance *= drafting.chance
                gains[place] += chance - self.wishes.price
        cost = sequences * self._shares.setdefault(sequences.bit_length(), Price(expected)).value
        passes = 0
        while passes < len(gains) and gains[passes] * self._left > cost:
            passes += 1
        if not passes and gains:
            self._tries = self._steps >= self._again_at and self._lost + cost <= TRIES_FREE + TRIES_SHARE * generated
            passes = int(self._tries)
        self._asked = len(drafts) if passes else 0
        return passes

    def note_found(self) -> None:
        """Take in that something was looked up for a sequence."""
        self._found += 1

    def note_drafts(self, drafting: Drafting, output_tokens: int, drafted: int, accepted: int) -> None:
        """Take in what became of a sequence's drafts, which has so many tokens of output since."""
        self._passes = max(self._passes, drafted)
        self._drafted += accepted - self.wishes.price * drafted
        self.wishes.note(drafting, output_tokens, drafted, accepted)

    def note_step(self, sequences: int, drafting: float, reading: float) -> None:
        """Take in what the drafting and the reading of a step took, as shares of a step without drafts."""
        if self._asked:
            self._left += LEFT_WEIGHT * (max(0.0, 1.0 - self._found / self._asked) - self._left)
        self.purse -= sequences * min(reading, SLOWER_MAX)
        if self._passes:
            place = sequences.bit_length()
            self._shares.setdefault(place, Price(drafting / self._passes)).note(self._passes, min(drafting, SLOWER_MAX))
            self._note_gain(self._drafted - sequences * min(drafting, SLOWER_MAX))
        self.purse = min(self.purse + READING_SHARE * sequences, PURSE_TOKENS)
        self._asked, self._found, self._passes, self._drafted = 0, 0, 0, 0.0

    def _note_gain(self, gain: float) -> None:
        """Take in how many tokens more or less there are for a step's drafts."""
        self.purse += gain
        if not self._tries:
            self._retry_after = RETRY_AFTER_MIN
            return
        self._lost += max(-gain, 0.0)
        self._again_at = self._steps + self._retry_after
        self._retry_after = RETRY_AFTER_MIN if gain > 0 else min(2 * self._retry_after, RETRY_AFTER_MAX)
