"""Decides how many tokens may be drafted for each sequence in a step: as many as are likely to bring more than they cost.

A drafted token is one more row of the step. What a row costs is counted in tokens, as the share of what a token takes without:

    price = (seconds that a row adds to a step) * sequences / (seconds of a step without drafts)

It pays while the chance that it is accepted, after all before it were, is over that price. Both are measured: the chance for each
sequence; the price by the number of sequences, since at many of them a step's time goes with its rows and no draft pays any more.
A step without drafts is taken now and then so that there is always something to compare with.

Drafts are looked up, or, where nothing is found, made by a draft model; their chances are kept apart. A pass of the model brings
one token for each sequence that takes part, and takes about as long however many do. So it is decided for all of them: there is
one more pass while what it is likely to bring to all together, rows paid, is more than it costs. Before its first draft for a
sequence the model has to read what came before; that is paid for out of what its drafts have brought (`DraftModel.purse`).

The node's profile only says what things cost before anything was measured. How drafts are made is the engine's business.
"""

from collections.abc import Iterable, Sequence
from math import log

from orchestrator.core.commands import Slice
from orchestrator.core.cost.costs import decode_seconds, smoothed, step_seconds
from orchestrator.core.events import SliceResult
from orchestrator.core.types import NodeSpec

#: A row's price where the profile knows nothing, and what share of a step without drafts a pass of a draft model takes.
PRICE_UNKNOWN = 0.15
PASS_UNKNOWN = 0.2
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
#: Tokens that a draft model's reading may cost before its drafts have brought any, and most that they can bring in advance; the
#: share of a node's tokens that it may cost whatever they bring.
PURSE_TOKENS = 256.0
READING_SHARE = 0.005
#: Tokens of output that must be possible still for the model to begin to read.
READ_FOR_TOKENS = 16
#: Weight of the newest step in the share of sequences for which nothing is found.
LEFT_WEIGHT = 0.1


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
        self._shares: dict[int, _Price] = {}
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
        cost = sequences * self._shares.setdefault(sequences.bit_length(), _Price(expected)).value
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
            self._shares.setdefault(place, _Price(drafting / self._passes)).note(self._passes, min(drafting, SLOWER_MAX))
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


class Speculation:
    """What a node knows of the drafts of its sequences."""

    __slots__ = (
        "_drafting_s", "_generated", "_looked_up", "_model", "_plain", "_prices", "_profile", "_reading_s", "accepted_tokens",
        "drafted_tokens", "rows_max",
    )  # fmt: skip

    def __init__(self, spec: NodeSpec) -> None:
        self._profile = spec.profile
        self._looked_up = DraftKind(spec.draft_tokens_max)
        self._model = DraftModel(spec.draft_tokens_max) if spec.draft_model else None
        #: By number of sequences: exactly, and rounded down to a power of two.
        self._plain: dict[int, _Plain] = {}
        self._prices: dict[int, _Price] = {}
        #: Rows that the step that is being formed may have for drafts: no more than were measured by now, so that finding out
        #: that they are dear is not.
        self.rows_max = 0
        #: Tokens of output.
        self._generated = 0
        #: Seconds in which a draft model drafted and read, in the step whose results are being noted.
        self._drafting_s = 0.0
        self._reading_s = 0.0
        self.drafted_tokens = 0
        self.accepted_tokens = 0

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
        self._looked_up.price, self.rows_max = price.value, int(max(PRIOR_ROWS, price.rows))
        if self._model is not None:
            self._model.wishes.price = price.value
        return True

    def new_sequence(self) -> SequenceDrafts:
        """Return what is known of a sequence that has had no draft yet."""
        modelled = Drafting(self._model.wishes.chances.chance) if self._model is not None else None
        return SequenceDrafts(Drafting(self._looked_up.chances.chance), modelled)

    def looked_up_for(self, drafts: SequenceDrafts, output_tokens: int) -> int:
        """Return how many tokens may be looked up for a sequence in this step."""
        return self._looked_up.tokens_for(drafts.looked_up, output_tokens, self._generated)

    def wish_for(self, drafts: SequenceDrafts, output_tokens: int, output_tokens_max: int) -> int:
        """Return how many tokens a draft model would draft for a sequence in this step if that cost nothing but their rows."""
        if self._model is None or drafts.modelled is None:
            return 0
        if drafts.modelled.trials == PRIOR_TRIALS:  # it has had none: what is known is what others had lately
            drafts.modelled.accepted = self._model.wishes.chances.chance * PRIOR_TRIALS
        if not drafts.read or drafts.probing:
            enough = drafts.read or output_tokens_max - output_tokens >= READ_FOR_TOKENS
            if not enough or not self._model.may_read(drafts, drafts.modelled):
                return 0
        wish = self._model.wishes.tokens_for(drafts.modelled, output_tokens, self._generated)
        return max(wish, 1) if drafts.probing else wish

    def passes_for(self, wishes: Iterable[tuple[SequenceDrafts, int]], sequences: int, context_tokens: int) -> int:
        """Return how many of these tokens, of each sequence, there may be in a step of so many sequences."""
        if self._model is None:
            return 0
        drafts = [(of.modelled, wish) for of, wish in wishes if of.modelled is not None and wish]
        return self._model.passes_for(drafts, sequences, self._expected_pass(sequences, context_tokens), self._generated)

    def note_drafts(self, drafts: SequenceDrafts, output_tokens: int, result: SliceResult) -> None:
        """Take in what became of a sequence's drafts, which has so many tokens of output since."""
        drafted, accepted = result.drafted_tokens, result.output_tokens - 1
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        if result.drafting_s is None:
            self._looked_up.note(drafts.looked_up, output_tokens, drafted, accepted)
            if self._model is not None:
                self._model.note_found()
            return
        assert self._model is not None, f"a draft model took {result.drafting_s} s, and there is none"
        assert drafts.modelled is not None, "where there is a draft model each sequence has drafts of it"
        drafts.read = drafted > 0
        if drafted:
            drafts.probing = False
            self._drafting_s += result.drafting_s
            self._model.note_drafts(drafts.modelled, output_tokens, drafted, accepted)
        else:
            self._reading_s += result.drafting_s

    def note_step(self, sequences: int, rows: int, seconds: float, alone: bool) -> None:
        """Take in how long a step took beside a draft model's work, with so many drafted rows, and with or without prompts."""
        plain = self._plain.get(sequences)
        if self._model is not None:
            plain_s = plain.seconds if plain is not None and plain.seconds > 0.0 else seconds
            if plain_s > 0.0:
                self._model.note_step(sequences, self._drafting_s / plain_s, self._reading_s / plain_s)
            self._drafting_s = self._reading_s = 0.0
        if not alone:
            return
        self._generated += sequences
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

    def _expected_pass(self, sequences: int, context_tokens: int) -> float:
        """Return what share of a step without drafts a pass of the draft model takes, as the profile has it."""
        alone_s = decode_seconds(self._profile, sequences, context_tokens)
        known = alone_s > 0.0 and self._profile.draft_step_s > 0.0
        return self._profile.draft_step_s / alone_s if known else PASS_UNKNOWN


def textless_drafts(parts: Iterable[Slice], models: bool) -> list[int]:
    """Return how many tokens are drafted for each of a step's slices where there is no text: by a draft model if there is one.

    What could be looked up beside it is not known.
    """
    return [part.model_draft_max if models else part.draft_max for part in parts]


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
