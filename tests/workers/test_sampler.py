"""What limits the choice of a token does so to the letter as the logits processors of `transformers` do."""

import math
import random
from array import array
from collections.abc import Sequence

import pytest
import torch
from transformers.generation import logits_process as theirs

from orchestrator.core.types import Sampling
from workers.engines.sampler import sample
from workers.engines.sequences import TokenSequence

VOCABULARY, PROMPT, STEPS = 24, (3, 7, 7, 12, 5), 40
ENDS = (2, 9)
RUNS = ((4,), (9, 9), (2, 2), (9, 2), (2, 7, 9), (*PROMPT, 9), (*PROMPT, 2))


def fixed(seed: int) -> list[torch.Tensor]:
    """Return a row of logits for each step, spread such that few tokens come again and again."""
    source = torch.Generator().manual_seed(seed)
    favour = 3 * torch.randn(VOCABULARY, generator=source)
    favour[list(ENDS)] += 4
    return [favour + torch.randn(VOCABULARY, generator=source) for _ in range(STEPS)]


def theirs_of(processors: Sequence[theirs.LogitsProcessor], logits: Sequence[torch.Tensor]) -> list[int]:
    tokens = list(PROMPT)
    for row in logits:
        scores = row[None]
        for one in processors:
            scores = one(torch.LongTensor([tokens]), scores)
        tokens.append(int(scores.argmax()))
    return tokens[len(PROMPT) :]


def ours_of(sampling: Sampling, logits: Sequence[torch.Tensor], steps: int = STEPS, before: Sequence[int] = ()) -> list[int]:
    sequence = TokenSequence(array("I", [*PROMPT, *before]), sampling, VOCABULARY, len(before))
    for row in logits[len(before) : steps]:
        sample(row[None], [sequence])
    return sequence.tokens.tolist()[len(PROMPT) :]


def repetition(penalty: float) -> theirs.LogitsProcessor:
    return theirs.RepetitionPenaltyLogitsProcessor(penalty)


def least(count: int) -> theirs.LogitsProcessor:
    return theirs.MinNewTokensLengthLogitsProcessor(len(PROMPT), count, list(ENDS), device="cpu")


def without(runs: Sequence[Sequence[int]]) -> theirs.LogitsProcessor:
    return theirs.NoBadWordsLogitsProcessor([list(run) for run in runs])


def only(allowed: Sequence[int]) -> theirs.LogitsProcessor:
    return theirs.PrefixConstrainedLogitsProcessor(lambda batch, tokens: list(allowed), 1)


CASES = {
    "nothing": (Sampling(), ()),
    "repetition": (Sampling(repetition_penalty=1.7), (repetition(1.7),)),
    "repetition wanted": (Sampling(repetition_penalty=0.6), (repetition(0.6),)),
    "length": (Sampling(output_tokens_min=25, stop_token_ids=ENDS), (least(25),)),
    "runs": (Sampling(forbidden_runs=RUNS), (without(RUNS),)),
    "allowed": (Sampling(allowed_token_ids=(0, 2, 5, 7, 20)), (only((0, 2, 5, 7, 20)),)),
    "all": (
        Sampling(
            logit_bias={7: 4.0, 12: -3.0},
            repetition_penalty=1.3,
            output_tokens_min=12,
            stop_token_ids=ENDS,
            forbidden_runs=RUNS,
            allowed_token_ids=(*range(1, 23),),
        ),
        (
            theirs.SequenceBiasLogitsProcessor([[[7], 4.0], [[12], -3.0]]),
            repetition(1.3),
            without(RUNS),
            least(12),
            only((*range(1, 23),)),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(case: str) -> None:
    sampling, processors = CASES[case]
    changed = 0
    for seed in range(8):
        logits = fixed(seed)
        expected = theirs_of(processors, logits)
        assert ours_of(sampling, logits) == expected
        # Another node that goes on with the first tokens chooses the rest alike.
        assert ours_of(sampling, logits, before=expected[:17]) == expected
        changed += expected != theirs_of((), logits)
    assert changed > 2 or case == "nothing"


@pytest.mark.parametrize("case", CASES)
def test_rows_of_drafts_see_what_was_drafted_before_them(case: str) -> None:
    sampling, _ = CASES[case]
    guess = random.Random(case)
    for seed in range(8):
        logits = fixed(seed)
        expected = ours_of(sampling, logits)
        sequence = TokenSequence(array("I", PROMPT), sampling, VOCABULARY)
        while (done := len(sequence.tokens) - len(PROMPT)) < STEPS:
            drafts = expected[done : done + guess.randint(0, min(4, STEPS - done - 1))]
            if drafts and guess.random() < 0.3:
                drafts[-1] = guess.randrange(VOCABULARY)
            sequence.tokens.extend(drafts)
            sequence.drafted = len(drafts)
            sample(torch.stack(logits[done : done + len(drafts) + 1]), [sequence])
        assert sequence.tokens.tolist()[len(PROMPT) :] == expected


def test_draws_keep_to_what_may_come() -> None:
    logits = torch.zeros(1, VOCABULARY)
    found: set[int] = set()
    for seed in range(200):
        limits = Sampling(temperature=1.0, seed=seed, allowed_token_ids=(1, 2, 3, 4), forbidden_runs=((4,), (5, 3)))
        [output] = sample(logits, [TokenSequence(array("I", PROMPT), limits, VOCABULARY)])
        found.update(output.tokens)
    assert found == {1, 2}


def test_where_nothing_may_come_its_own_row_fails() -> None:
    impossible = Sampling(allowed_token_ids=(4,), forbidden_runs=((4,),))
    rows = [TokenSequence(array("I", PROMPT), one, VOCABULARY) for one in (impossible, Sampling())]
    failed, sound = sample(torch.zeros(2, VOCABULARY), rows)
    assert failed.failure == f"no token can be chosen: the largest logit is {-math.inf}"
    assert len(sound.tokens) == 1
