"""How well drafts do, of a sequence and of all of a node, and how many tokens are likely to bring more than their rows cost."""

from math import log

#: Rows that count as measured when a price is first needed, and the share of what was measured that counts on at the next step.
PRIOR_ROWS = 16.0
KEPT = 0.97
#: Accepted and rejected drafts that count as seen when a sequence begins, and the share that counts on at the next step.
PRIOR_TRIALS = 1.0
TRIALS_KEPT = 0.9
#: How likely a draft is accepted before any was, on this node.
CHANCE_UNKNOWN = 0.6
#: Tokens drafted to see whether it pays again, and tokens of output after which it is tried: doubled as long as it does not.
RETRY_TOKENS = 3
RETRY_AFTER_MIN = 16
RETRY_AFTER_MAX = 512
#: What such tries may cost a node: a share of the tokens that it generates, and tokens that it may lose before it has any.
TRIES_SHARE = 0.01
TRIES_FREE = 2.0
#: No step is believed to take more than so many times as long for its drafts. A suspended machine is not; but rows that many
#: threads meet over can really be ten times as dear as what they are compared with.
SLOWER_MAX = 16.0


class Drafting:
    """How well a sequence's drafts of one kind do."""

    __slots__ = ("accepted", "again_at", "retry_after", "trials")

    def __init__(self, chance: float) -> None:
        #: Accepted drafts and those that were looked at (one after a rejected one is not), the later ones counting more.
        self.accepted = chance * PRIOR_TRIALS
        self.trials = PRIOR_TRIALS
        #: Tokens of output before which nothing is drafted, and how long that lasts if it does not pay then either.
        self.again_at = 0
        self.retry_after = RETRY_AFTER_MIN

    @property
    def chance(self) -> float:
        """How likely a drafted token is accepted, if all before it were."""
        return self.accepted / self.trials

    def note(self, drafted: int, accepted: int) -> None:
        """Take in what became of a draft."""
        self.accepted = self.accepted * TRIALS_KEPT + accepted
        self.trials = self.trials * TRIALS_KEPT + min(accepted + 1, drafted)


class SequenceDrafts:
    """What is known of the drafts of one sequence."""

    __slots__ = ("looked_up", "modelled", "probing", "read")

    def __init__(self, looked_up: Drafting, modelled: Drafting | None) -> None:
        self.looked_up = looked_up
        #: None where there is no draft model.
        self.modelled = modelled
        #: Whether the model has read what came before, as far as is known.
        self.read = False
        #: Whether it reads to see if drafts pay again, and has a draft then whether that is likely to pay or not.
        self.probing = False

    @property
    def again_at(self) -> int:
        """Tokens of output from which something is tried again."""
        return self.looked_up.again_at if self.modelled is None else min(self.looked_up.again_at, self.modelled.again_at)


class Price:
    """What rows have cost at about a number of sequences."""

    __slots__ = ("rows", "tokens")

    def __init__(self, price: float) -> None:
        self.rows = PRIOR_ROWS
        self.tokens = price * PRIOR_ROWS

    @property
    def value(self) -> float:
        return max(0.0, self.tokens / self.rows)

    def note(self, rows: int, tokens: float) -> None:
        self.rows = self.rows * KEPT + rows
        self.tokens = self.tokens * KEPT + tokens


class DraftKind:
    """Drafts of one kind, of all sequences of a node."""

    __slots__ = ("_lost", "_tokens_max", "chances", "price")

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        #: Where a new sequence starts.
        self.chances = Drafting(CHANCE_UNKNOWN)
        #: What a drafted token costs in the step that is being formed, in tokens.
        self.price = 0.0
        #: Tokens that tries which did not pay have cost.
        self._lost = 0.0

    def tokens_for(self, drafting: Drafting, output_tokens: int, generated: int) -> int:
        """Return how many tokens may be drafted for a sequence; its node has generated so many for all."""
        chance, price = drafting.chance, self.price
        if chance**self._tokens_max > price:
            return self._tokens_max
        if chance > price:
            return max(1, int(log(price) / log(chance)))
        affordable = self._lost <= TRIES_FREE + TRIES_SHARE * generated
        return min(RETRY_TOKENS, self._tokens_max) if affordable and output_tokens >= drafting.again_at else 0

    def note(self, drafting: Drafting, output_tokens: int, drafted: int, accepted: int) -> None:
        """Take in what became of a sequence's drafts, which has so many tokens of output since."""
        if drafting.chance <= self.price:
            self._lost += max(self.price * drafted - accepted, 0.0)
        self.chances.note(drafted, accepted)
        drafting.note(drafted, accepted)
        if drafting.chance > self.price:
            drafting.retry_after = RETRY_AFTER_MIN
            return
        drafting.again_at = output_tokens + drafting.retry_after
        paid = accepted > self.price * drafted
        drafting.retry_after = RETRY_AFTER_MIN if paid else min(2 * drafting.retry_after, RETRY_AFTER_MAX)
