"""Decides how many tokens may be drafted for each sequence in a step: as many as are likely to bring more than they cost.

A drafted token is one more row of the step. What a row costs is counted in tokens, as the share of what a token takes without:

    price = (seconds that a row adds to a step) * sequences / (seconds of a step without drafts)

It pays while the chance that it is accepted, after all before it were, is over that price. Both are measured: the chance for each
sequence; the price by the number of sequences, since at many of them a step's time goes with its rows and no draft pays any more.
A step without drafts is taken now and then so that there is always something to compare with.

The node's profile only says what a row costs before anything was measured. Where drafts come from is the engine's business.
"""

from math import log

from orchestrator.core.cost.costs import decode_seconds, smoothed, step_seconds
from orchestrator.core.types import NodeSpec

#: A row's price where the profile knows nothing.
PRICE_UNKNOWN = 0.15
#: Rows that count as measured when a price is first needed, and the share of what was measured that counts on at the next step.
PRIOR_ROWS = 16.0
KEPT = 0.97
#: No step is believed to take more than so many times as long for its drafts. A suspended machine is not; but rows that many
#: threads meet over can really be ten times as dear as what they are compared with.
SLOWER_MAX = 16.0
#: Steps with drafts after which one without is taken; there are few of those, so that one counts as several.
PLAIN_EVERY = 48
PLAIN_COUNTS = 4
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


class Drafting:
    """How well a sequence's drafts do."""

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


class _Plain:
    """Steps of a number of sequences without drafts."""

    __slots__ = ("age", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        #: Steps with drafts since the last one.
        self.age = 0


class _Price:
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


class Speculation:
    """What a node knows of the drafts of its sequences."""

    __slots__ = (
        "_chances", "_generated", "_lost", "_plain", "_price", "_prices", "_profile", "_tokens_max", "accepted_tokens",
        "drafted_tokens", "rows_max",
    )  # fmt: skip

    def __init__(self, spec: NodeSpec) -> None:
        self._profile = spec.profile
        self._tokens_max = spec.draft_tokens_max
        #: By number of sequences: exactly, and rounded down to a power of two.
        self._plain: dict[int, _Plain] = {}
        self._prices: dict[int, _Price] = {}
        self._price = 0.0
        #: Rows that the step that is being formed may have for drafts: no more than were measured by now, so that finding out
        #: that they are dear is not.
        self.rows_max = 0
        #: Of all sequences: where a new one starts.
        self._chances = Drafting(CHANCE_UNKNOWN)
        #: Tokens of output, and those that tries which did not pay have cost.
        self._generated = 0
        self._lost = 0.0
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    @property
    def price(self) -> float:
        """What a drafted row costs in the step that is being formed, in tokens."""
        return self._price

    def begin_step(self, sequences: int, context_tokens: int, alone: bool) -> bool:
        """Look at a step of so many decoding sequences, with or without prompts.

        Returns False if nothing is to be drafted in it, so that there is a step to compare others with.
        """
        plain = self._plain.get(sequences)
        if alone and (plain is None or plain.age >= PLAIN_EVERY):
            return False
        place = sequences.bit_length()
        price = self._prices.get(place)
        if price is None:
            price = self._prices[place] = _Price(self._expected_price(sequences, context_tokens))
        self._price, self.rows_max = price.value, int(max(PRIOR_ROWS, price.rows))
        return True

    def new_sequence(self) -> Drafting:
        """Return what is known of a sequence that has had no draft yet."""
        return Drafting(self._chances.chance)

    def tokens_for(self, drafting: Drafting, output_tokens: int) -> int:
        """Return how many tokens may be drafted for a sequence in this step."""
        chance, price = drafting.chance, self._price
        if chance**self._tokens_max > price:
            return self._tokens_max
        if chance > price:
            return max(1, int(log(price) / log(chance)))
        affordable = self._lost <= TRIES_FREE + TRIES_SHARE * self._generated
        return min(RETRY_TOKENS, self._tokens_max) if affordable and output_tokens >= drafting.again_at else 0

    def note_drafts(self, drafting: Drafting, output_tokens: int, drafted: int, accepted: int) -> None:
        """Take in what became of a sequence's drafts, which has so many tokens of output since."""
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        if drafting.chance <= self._price:
            self._lost += max(self._price * drafted - accepted, 0.0)
        self._chances.note(drafted, accepted)
        drafting.note(drafted, accepted)
        if drafting.chance > self._price:
            drafting.retry_after = RETRY_AFTER_MIN
            return
        drafting.again_at = output_tokens + drafting.retry_after
        paid = accepted > self._price * drafted
        drafting.retry_after = RETRY_AFTER_MIN if paid else min(2 * drafting.retry_after, RETRY_AFTER_MAX)

    def note_step(self, sequences: int, rows: int, seconds: float) -> None:
        """Take in how long a step took that only decoded, with so many drafted rows."""
        self._generated += sequences
        plain = self._plain.get(sequences)
        if not rows:
            if plain is None:
                self._plain[sequences] = _Plain(seconds)
            else:
                plain.seconds = smoothed(plain.seconds, seconds, PLAIN_COUNTS)
                plain.age = 0
        elif plain is not None:
            plain.age += 1
            if plain.seconds > 0.0:
                slower = min(seconds / plain.seconds, SLOWER_MAX) - 1.0
                self._prices[sequences.bit_length()].note(rows, slower * sequences)

    def _expected_price(self, sequences: int, context_tokens: int) -> float:
        """Return what the profile says of a row's price."""
        profile = self._profile
        alone_s = decode_seconds(profile, sequences, context_tokens)
        if alone_s <= 0.0:
            return PRICE_UNKNOWN
        row = [(1, context_tokens // sequences)]
        return (step_seconds(profile, row, sequences, context_tokens) - alone_s) * sequences / alone_s


def accepted_drafts(chance: float, drafted: int, random: float) -> int:
    """Return how many drafts are accepted where nothing is computed, each with a chance if all before it were.

    Args:
        chance: that a drafted token is accepted.
        drafted: tokens drafted.
        random: a number in [0, 1).
    """
    accepted = 0
    while accepted < drafted and random < chance ** (accepted + 1):
        accepted += 1
    return accepted
