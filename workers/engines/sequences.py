"""What an engine keeps for one request: its tokens, its block table, how its tokens are chosen."""

import secrets
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.types import BlockId, Sampling, ThoughtsLimit
from workers.engines.grammars import Walk
from workers.engines.lookup import PromptLookup
from workers.engines.thoughts import ThoughtsCount


class TokenSequence:
    """One request in an engine."""

    __slots__ = (
        "adapter", "barred", "counts", "drafted", "ending", "failure", "lookup", "plain", "prompt_tokens", "sampling", "scored",
        "seed", "seen", "table", "thoughts", "tokens", "walk",
    )  # fmt: skip

    def __init__(
        self, tokens: "array[int]", sampling: Sampling, vocabulary: int, generated: int = 0, walk: Walk | None = None
    ) -> None:
        #: Prompt and output so far; while a step verifies drafts, those as well.
        self.tokens = array("I", tokens)
        #: How many of the tokens are drafts.
        self.drafted = 0
        self.prompt_tokens = len(tokens) - generated
        #: Finds what followed the last tokens before; None until something is to be drafted.
        self.lookup: PromptLookup | None = None
        #: Through its grammar, if it has one.
        self.walk = walk
        self.sampling = sampling
        #: Tokens of the prompt that need no log probabilities any more: all, where none are wanted.
        self.scored = 1 if sampling.prompt_logprobs is not None and not generated else self.prompt_tokens
        #: The number of its adapter; None: it has none.
        self.adapter: int | None = None
        self.seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        #: Counts its thoughts, if there is a limit of them.
        self.thoughts = ThoughtsCount(sampling.thoughts, self.prompt_tokens) if sampling.thoughts is not None else None
        #: Tokens that end the sequence.
        self.ending = frozenset(sampling.stop_token_ids)
        penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        #: True when the most likely token is taken and nothing else is asked for.
        self.plain = sampling.temperature == 0 and not (penalised or sampling.logprobs is not None or _is_limited(sampling))
        #: How often each token was generated; kept only when penalties need it.
        self.counts: dict[int, int] | None = dict(Counter(tokens[len(tokens) - generated :])) if penalised else None
        #: Which tokens there are in prompt and output, by token; kept only when a penalty needs it.
        self.seen: NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = np.zeros(vocabulary, dtype=np.bool_)
            self.seen[[token for token in self.tokens if token < vocabulary]] = True
        #: Added to logits to leave nothing but the tokens that may come; None if all may.
        self.barred: NDArray[np.float32] | None = None
        if sampling.allowed_token_ids:
            self.barred = np.full(vocabulary, -np.inf, dtype=np.float32)
            self.barred[list(sampling.allowed_token_ids)] = 0.0
        #: Block of each run of `block_tokens` tokens; what lies behind the last block told is void.
        self.table: NDArray[np.int64] = np.zeros(8, dtype=np.int64)
        #: Why it cannot be computed at all.
        self.failure = _unknown_token(self.tokens, vocabulary, sampling.thoughts)

    def place(self, first: int, blocks: Sequence[BlockId]) -> None:
        """Enter blocks into the table from index `first` on."""
        end = first + len(blocks)
        if end > len(self.table):
            grown = np.zeros(max(end, 2 * len(self.table)), dtype=np.int64)
            grown[: len(self.table)] = self.table
            self.table = grown
        self.table[first:end] = blocks

    def draft(self, most: int) -> int:
        """Add up to so many tokens that are likely to come next and may come, to be verified; return how many."""
        if self.lookup is None:
            self.lookup = PromptLookup()
        drafts = self.lookup.find(self.tokens, most)
        if self.walk is not None:
            drafts = drafts[: self.walk.passable(self.tokens, drafts)]
        self.drafted = len(drafts)
        self.tokens.extend(drafts)
        return self.drafted

    def take_drafts(self) -> "array[int]":
        """Take the drafts out again, and return them."""
        known = len(self.tokens) - self.drafted
        drafts = self.tokens[known:]
        del self.tokens[known:]
        self.drafted = 0
        return drafts

    def append(self, token: int) -> None:
        """Take a generated token."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts[token] = self.counts.get(token, 0) + 1
        if self.seen is not None:
            self.seen[token] = True


def _is_limited(sampling: Sampling) -> bool:
    """Return whether any logit is changed, but for the penalties of what was generated."""
    changed = sampling.logit_bias or sampling.repetition_penalty != 1.0
    return bool(changed or sampling.output_tokens_min or sampling.forbidden_runs or sampling.allowed_token_ids)


def _unknown_token(tokens: "array[int]", vocabulary: int, thoughts: ThoughtsLimit | None) -> str | None:
    if not tokens:
        return "the prompt is empty"
    put = (thoughts.end, thoughts.instead or 0) if thoughts is not None else ()
    highest = max((int(np.frombuffer(tokens, dtype=np.uint32).max()), *put))
    return None if highest < vocabulary else f"token {highest} is not in the model's vocabulary of {vocabulary}"
