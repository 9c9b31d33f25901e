"""Drafts by looking a sequence's last tokens up in itself: what followed them the last time probably follows them again.

Agents repeat what they have read: a file they edit, a tool's output they quote, the call they made before. All of that is in
their prompts, which hold all earlier turns. The index is a table of positions by the hash of three tokens, in which a later
place overwrites an earlier one: its size is bounded however long the context is, and what is found is compared before it is used.
"""

from array import array

import numpy as np

#: Tokens that must be equal for what follows them to be believed.
NGRAM = 3
#: Entries of a table at first and at most (1 MiB); in between it has at least twice as many as there are tokens.
ENTRIES_MIN = 1 << 10
ENTRIES_MAX = 1 << 18
#: New tokens from which they are entered all at once.
BULK = 64
_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)
_MASK = 0xFFFFFFFF


class PromptLookup:
    """The index of one sequence."""

    __slots__ = ("_entered", "_shift", "_table")

    def __init__(self) -> None:
        #: Position after the latest three tokens of a hash; 0: none.
        self._table = array("i")
        self._shift = 32
        #: Three tokens are entered up to those that end before this position.
        self._entered = NGRAM - 1

    def find(self, tokens: "array[int]", most: int) -> "array[int]":
        """Return up to `most` tokens that are likely to follow `tokens`: those of the last call and further ones.

        They are no more than are equal before them, so that what was found by chance is short.
        """
        end = len(tokens)
        if end <= NGRAM:
            return array("I")
        self._enter(tokens, end - 1)
        place = self._table[self._hash(tokens[end - 3], tokens[end - 2], tokens[end - 1])]
        equal = 0
        while equal < min(most, place) and tokens[place - 1 - equal] == tokens[end - 1 - equal]:
            equal += 1
        # Of fewer than three wanted tokens fewer are compared; then those three must be equal all the same.
        if not place or (equal < NGRAM and tokens[place - NGRAM : place] != tokens[end - NGRAM :]):
            return array("I")
        found = tokens[place : place + equal]
        while len(found) < equal:  # it ran into the end: what repeats with so short a period goes on like that
            found.extend(found[: equal - len(found)])
        return found

    def _enter(self, tokens: "array[int]", end: int) -> None:
        """Enter all threes of tokens that end before `end`."""
        if len(self._table) < min(2 * end, ENTRIES_MAX):
            entries = min(max(ENTRIES_MIN, 1 << (4 * end - 1).bit_length()), ENTRIES_MAX)
            self._table = array("i", bytes(4 * entries))
            self._shift = 33 - entries.bit_length()
            self._entered = NGRAM - 1
        if end - self._entered >= BULK:
            self._enter_all(tokens, end)
        for last in range(self._entered, end):
            self._table[self._hash(tokens[last - 2], tokens[last - 1], tokens[last])] = last + 1
        self._entered = max(self._entered, end)

    def _enter_all(self, tokens: "array[int]", end: int) -> None:
        first = self._entered - NGRAM + 1
        values = np.array(tokens[first:end], dtype=np.uint32)
        parts = [values[place : len(values) - NGRAM + 1 + place] * np.uint32(_FACTORS[place]) for place in range(NGRAM)]
        hashes = (parts[0] ^ parts[1] ^ parts[2]) >> np.uint32(self._shift)
        np.frombuffer(self._table, dtype=np.int32)[hashes] = np.arange(self._entered + 1, end + 1, dtype=np.int32)
        self._entered = end

    def _hash(self, first: int, second: int, third: int) -> int:
        one, two, three = _FACTORS
        return ((first * one ^ second * two ^ third * three) & _MASK) >> self._shift
