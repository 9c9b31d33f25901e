"""An answer in channels is bound where it is said, and thinks freely before."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.grammars import Thoughts, answer_part, whole
from orchestrator.live.text.reasoning import CHANNEL_MARKS, ReasoningStyle

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in (*CHANNEL_MARKS, "<|endoftext|>")])
    return made


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('<|channel|>final<|message|>{"x": 5}', True),
        ('<|channel|>analysis<|message|>Any, {"y"<|end|><|start|>assistant<|channel|>final<|message|>{"x": 5}', True),
        ('<|channel|>final<|message|>{"y": 5}', False),
        ('{"x": 5}', False),
        ('<|channel|>commentary<|message|>{"x": 5}', False),
    ],
)
def test_what_is_said_is_bound_and_thoughts_are_not(tokenizer: Tokenizer, text: str, taken: bool) -> None:
    marks = {mark: tokenizer.token_to_id(mark) for mark in CHANNEL_MARKS}
    thoughts = Thoughts.after("<|start|>assistant", ReasoningStyle.HARMONY, False, True)
    part = answer_part(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), "response_format"))
    grammar = whole("@answer", (), (part,), part.field, thoughts, marks)
    ends = tokenizer.token_to_id("<|endoftext|>")
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size(), eos_token=ends), grammar.text)
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert matcher.get_error() == ""
    assert (matcher.validate_tokens(tokens) == len(tokens)) is taken
    if taken:
        matcher.consume_tokens(tokens)
        assert matcher.is_accepting()
