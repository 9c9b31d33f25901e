"""Tells prompts beside answers: echoed before them, with OpenAI's log probabilities, or token by token in vLLM's words."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.turns import PromptScores


class Echo:
    """A prompt as it stands before what is generated after it.

    Args:
        tokens: the prompt's.
        vocabulary: its model's.
        given: what it was made of, if that was a text: what the model puts in front of it is not echoed.
    """

    def __init__(self, tokens: Sequence[int], vocabulary: Vocabulary, given: str | None) -> None:
        self._tokens = tokens
        detokeniser = vocabulary.detokeniser(special=True)
        texts = [detokeniser.add(token) for token in tokens]
        texts[-1] += detokeniser.finish()
        self.text = "".join(texts)
        before = 0
        if given is not None and self.text.endswith(given):
            before = len(self.text) - len(given)
            self.text = given
        ends = accumulate(map(len, texts))
        #: Characters of the text before each token's.
        self._offsets = [max(0, end - len(text) - before) for end, text in zip(ends, texts, strict=True)]

    def logprobs(self, scores: PromptScores, tops: int, name: Callable[[int], str]) -> dict[str, Any]:
        """Return OpenAI's log probabilities, with so many likely tokens beside each of the prompt's; the first has none."""
        found = [scores.at(place) for place in range(1, len(self._tokens))]
        top = [
            by_name([*top[:tops], (token, logprob)], name)
            for token, (logprob, _, top) in zip(self._tokens[1:], found, strict=True)
        ]
        return {
            "tokens": [name(token) for token in self._tokens],
            "token_logprobs": [None, *(logprob for logprob, _, _ in found)],
            "top_logprobs": [None, *top],
            "text_offset": self._offsets,
        }


def scored_prompt(tokens: Sequence[int], scores: PromptScores, vocabulary: Vocabulary) -> list[Any]:
    """Return vLLM's log probabilities of a prompt: for each token but the first its own and the likeliest, by number."""
    found: list[Any] = [None]
    for place, token in enumerate(tokens[1:], 1):
        logprob, rank, top = scores.at(place)
        ranked = {token: (logprob, rank)} | {likely: (value, number) for number, (likely, value) in enumerate(top, 1)}
        found.append({str(one): _told(one, *values, vocabulary) for one, values in ranked.items()})
    return found


def _told(token: int, logprob: float, rank: int, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": vocabulary.token_bytes(token).decode(errors="replace")}


def by_name(likely: Sequence[tuple[int, float]], name: Callable[[int], str]) -> dict[str, float]:
    """Return log probabilities by name; of tokens of one name (a special one may be called like another) the first one's."""
    named: dict[str, float] = {}
    for token, logprob in likely:
        named.setdefault(name(token), logprob)
    return named
