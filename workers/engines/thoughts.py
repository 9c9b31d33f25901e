"""Keeps an output's thoughts as short as they may be: counts them, and says what comes where they would be longer.

    thinking, and as many tokens as there may be    the token that ends thoughts
    about to think again (in channels)              the channel of answers in the place of that of thoughts

What is counted is a function of the output's tokens alone, whichever way they came.
"""

from array import array
from dataclasses import dataclass, replace

from orchestrator.core.types import ThoughtsLimit

#: Tokens within which thoughts begin where they may begin once: some models write white space before.
WITHIN = 4


@dataclass(frozen=True, slots=True)
class _State:
    """Where an output is."""

    thinking: bool
    #: Tokens of thoughts so far.
    spent: int = 0
    #: Tokens so far of those that begin thoughts.
    begun: int = 0
    #: Tokens so far that were no thoughts.
    others: int = 0


class ThoughtsCount:
    """One output's.

    Args:
        limit: how many tokens of them there may be, and which tokens tell.
        start: tokens of the sequence that are not the output's: its prompt.
    """

    __slots__ = ("_known", "_limit", "_state")

    def __init__(self, limit: ThoughtsLimit, start: int) -> None:
        self._limit = limit
        #: Tokens of the sequence that the state is after.
        self._known = start
        self._state = _State(thinking=not limit.begin)

    def kept(self, chosen: int, tokens: "array[int]", drafted: int, ahead: int) -> int:
        """Return which token comes where one was chosen.

        Args:
            chosen: what would come.
            tokens: the sequence's, drafts included.
            drafted: how many of them are drafts, the last ones.
            ahead: how many of those stand before the place.
        """
        known = len(tokens) - drafted
        self._state = self._after(self._state, tokens[self._known : known])
        self._known = known
        state = self._after(self._state, tokens[known : known + ahead]) if ahead else self._state
        limit = self._limit
        if state.spent < limit.tokens_max:
            return chosen
        if state.thinking:
            return limit.end
        again = limit.instead is not None and state.begun == 1 and chosen == limit.begin[1]
        return limit.instead if again and limit.instead is not None else chosen

    def _after(self, state: _State, tokens: "array[int]") -> _State:
        for token in tokens:
            state = self._next(state, token)
        return state

    def _next(self, state: _State, token: int) -> _State:
        limit = self._limit
        if state.thinking:
            ended = token == limit.end
            # Where they may begin once they cannot begin later either.
            return replace(state, thinking=False, others=WITHIN) if ended else replace(state, spent=state.spent + 1)
        if not limit.begin or (limit.instead is None and state.others >= WITHIN):
            return state
        begun = state.begun + 1 if token == limit.begin[state.begun] else int(token == limit.begin[0])
        if begun == len(limit.begin):
            return replace(state, thinking=True, begun=0)
        return replace(state, begun=begun, others=state.others + 1)
