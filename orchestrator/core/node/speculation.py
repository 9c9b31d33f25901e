"""Decides how many tokens may be drafted for each sequence in a step: as many as are likely to bring more than they cost.

A drafted token is one more row of the step. What a row costs is counted in tokens, as the share of what a token takes without:

    price = (seconds that a row adds to a step) * sequences / (seconds of a step without drafts)

It pays while the chance that it is accepted, after all before it were, is over that price. Both are measured: the chance for each
sequence; the price by the number of sequences, since at many of them a step's time goes with its rows and no draft pays any more.
A step without drafts is taken now and then so that there is always something to compare with.

Drafts are looked up, or, where nothing is found, made by a draft model (`draft_model.py`); their chances are kept apart.

The node's profile only says what things cost before anything was measured. How drafts are made is the engine's business.
"""

from collections.abc import Iterable

from orchestrator.core.commands import Slice
from orchestrator.core.cost.costs import decode_seconds, smoothed, step_seconds
from orchestrator.core.events import SliceResult
from orchestrator.core.node.draft_model import DraftModel
from orchestrator.core.node.drafting import PRIOR_ROWS, PRIOR_TRIALS, SLOWER_MAX, Drafting, DraftKind, Price, SequenceDrafts
from orchestrator.core.types import NodeSpec

#: A row's price where the profile knows nothing, and what share of a step without drafts a pass of a draft model takes.
PRICE_UNKNOWN = 0.15
PASS_UNKNOWN = 0.2
#: Steps with drafts after which one without is taken; there are few of those, so that one counts as several.
PLAIN_EVERY = 48
PLAIN_COUNTS = 4
#: Tokens of output that must be possible still for the model to begin to read.
READ_FOR_TOKENS = 16


class _Plain:
    """Steps of a number of sequences without drafts."""

    __slots__ = ("age", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        #: Steps with drafts since the last one.
        self.age = 0


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
        self._prices: dict[int, Price] = {}
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
            price = self._prices[place] = Price(self._expected_price(sequences, context_tokens))
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
