"""An answer in channels is bound where it is said and where it calls, and thinks freely before."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.arguments import Tool
from orchestrator.live.text.call_grammars import calls_of
from orchestrator.live.text.channels import ChannelParser
from orchestrator.live.text.grammars import Thoughts, answer_part, whole
from orchestrator.live.text.reasoning import CHANNEL_MARKS, Reasoning
from orchestrator.live.text.styles import ToolStyle, call_id
from orchestrator.live.text.tools import calls_in

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in (*CHANNEL_MARKS, "<|endoftext|>")])
    return made


def taken(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Tell whether a text is all of an answer."""
    end = tokenizer.token_to_id("<|endoftext|>")
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size(), eos_token=end), grammar, log_level=0)
    assert matcher.get_error() == ""
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('<|channel|>final<|message|>{"x": 5}', True),
        ('<|channel|>analysis<|message|>Any, {"y"<|end|><|start|>assistant<|channel|>final<|message|>{"x": 5}', True),
        ('<|channel|>final<|message|>{"y": 5}', False),
        ('{"x": 5}', False),
        ('<|channel|>commentary<|message|>{"x": 5}', False),
    ],
)
def test_what_is_said_is_bound_and_thoughts_are_not(tokenizer: Tokenizer, text: str, kept: bool) -> None:
    marks = {mark: tokenizer.token_to_id(mark) for mark in CHANNEL_MARKS}
    thoughts = Thoughts(in_channels=True)
    part = answer_part(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), "response_format"))
    grammar = whole(thoughts.said("@answer", marks), (), (part,), part.field, thoughts, marks)
    assert taken(tokenizer, grammar.text, text) is kept


THOUGHT = "<|channel|>analysis<|message|>Any, {<|end|><|start|>assistant"
#: Each with whether it is a call, and whether it is an answer that may call.
CALLS = [
    ('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 5}', True, True),
    (' to=functions.f<|channel|>commentary json<|message|>{"x": 5}', True, True),
    (f'{THOUGHT}<|channel|>commentary to=functions.f<|message|>{{"x": 5}}', True, True),
    (f'{THOUGHT}<|channel|>commentary<|message|>Now.<|end|><|start|>assistant to=functions.g<|channel|>commentary<|message|>{{}}',
     False, True),
    (f"{THOUGHT}<|channel|>final<|message|>No call.", False, True),
    ("<|channel|>commentary<|message|>No call, and", False, True),
    ('<|channel|>commentary to=functions.f<|message|>{"x": "5"}', False, False),
    (f'{THOUGHT}{THOUGHT}<|channel|>commentary to=functions.g<|message|>{{"x": 5}}', False, False),
    ("<|channel|>commentary to=functions.h<|message|>{}", False, False),
    ('<|channel|>commentary to=functions.g<|message|>{}<|call|><|start|>assistant', False, False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "forced", "free"), CALLS)
def test_calls_are_messages_to_tools_and_their_arguments_are_bound(
    tokenizer: Tokenizer, text: str, forced: bool, free: bool
) -> None:
    marks = {mark: tokenizer.token_to_id(mark) for mark in CHANNEL_MARKS}
    tools = [Tool("f", SCHEMA, True, "tools[0].parameters"), Tool("g", None, False, "tools[1].parameters")]
    calls = calls_of(ToolStyle.HARMONY, tools, True, marks)
    assert calls is not None
    thoughts = Thoughts(in_channels=True)
    may = whole(calls.free, (*calls.free_rules, *calls.rules), calls.parts, "tools", thoughts, marks)
    must = whole(calls.forced, calls.rules, calls.parts, "tool_choice", thoughts, marks)
    assert taken(tokenizer, must.text, text) is forced
    assert taken(tokenizer, may.text, text) is free
    if forced:
        parser = ChannelParser({"f", "g"}, call_id)
        [call] = calls_in([part for part in [*parser.add(text), *parser.finish()] if not isinstance(part, Reasoning)])
        assert (call.name, json.loads(call.arguments)) == ("f", {"x": 5})
