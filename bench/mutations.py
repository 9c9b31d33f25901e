"""Makes hostile input out of good input, from a seed: JSON bodies with parts swapped, nested or cut, and protobuf frames."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

#: What a value may be turned into, whatever it was.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 4.0, 4.5, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63),
    "", "x", "\0", "\ud800", "𝒳" * 9, "9" * 400, "<|im_end|>",
    [], {}, [[]], [{}], {"": None}, [None], [1, "a", None], {"type": "function"}, "none", "auto", [0] * 300,
)  # fmt: skip
#: Stands for brackets in brackets, so many, which are put in once the rest is text.
_DEEP = "nested so deeply: "
_DEEP_PLACE = re.compile(rb'"nested so deeply: (\d+)"')
BODIES: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/chat/completions": (
        {"model": "M", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 3},
        {
            "model": "M", "max_completion_tokens": 2, "stream": True,
            "stream_options": {"include_usage": True}, "n": 2,
            "seed": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
            "min_p": 0.1, "stop": ["a", "b"], "logprobs": True, "top_logprobs": 2,
            "logit_bias": {"5": 1}, "presence_penalty": 0.1, "frequency_penalty": -0.1, "service_tier": "flex", "priority": 1,
            "nvext": {"agent_hints": {"priority": 2}, "agent_context": {"session_id": "s"}, "cache_salt": "q"},
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "done"}, {"role": "user", "content": "Go on", "name": "n"},
            ],
        },
        {
            "model": "M", "max_tokens": 2,
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "one"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
            "tool_choice": "auto", "continue_final_message": True, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low",
        },
    ),
    "/v1/completions": (
        {"model": "M", "prompt": "Once upon", "max_tokens": 3, "logprobs": 1, "stream": True},
        {"model": "M", "prompt": [5, 6, 7], "max_tokens": 2, "stop_token_ids": [9], "ignore_eos": True, "echo": False},
        {"model": "M", "prompt": ["a", "b"], "n": 2, "max_tokens": 1, "best_of": 2, "suffix": None, "user": "u"},
    ),
    "/v1/messages": (
        {"model": "M", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 3, "system": "Be brief"},
        {
            "model": "M", "stream": True, "max_tokens": 2, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "speed": "standard",
            "stop_sequences": ["a", "b"], "metadata": {"user_id": "user_1_session_2"}, "thinking": {"type": "adaptive"},
            "output_config": {"effort": "low"}, "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
            "tools": [{"name": "f", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            "tool_choice": {"type": "auto"}, "cache_control": {"type": "ephemeral"},
            "system": [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "", "signature": "weft-holds-eA=="}, {"type": "text", "text": "y"},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "c", "is_error": True, "content": [{"type": "text", "text": "z"}]},
                    {"type": "document", "source": {"type": "text", "data": "d"}, "citations": {"enabled": False}},
                ]},
                {"role": "system", "content": "Go on"},
            ],
        },
        {
            "model": "M", "max_tokens": 1, "service_tier": "auto", "container": None, "mcp_servers": [],
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "So"}],
        },
    ),
    "/v1/messages/count_tokens": (
        {"model": "M", "messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "input_schema": {}}]},
    ),
    "/v1/responses": (
        {"model": "M", "input": "Hello there", "max_output_tokens": 3, "instructions": "Be brief", "metadata": {"a": "b"}},
        {
            "model": "M", "stream": True, "store": False, "max_output_tokens": 2, "top_logprobs": 2, "truncation": "auto",
            "include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "tool_choice": "auto",
            "reasoning": {"summary": "auto"}, "text": {"format": {"type": "text"}, "verbosity": "low"},
            "tools": [
                {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}, {"type": "web_search"},
                {"type": "custom", "name": "c", "format": {"type": "text"}},
                {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "f"}]},
            ],
            "input": [
                {"role": "developer", "content": "Be brief"},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "t"}], "encrypted_content": "d"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y", "annotations": []}]},
                {"type": "function_call", "call_id": "c1", "name": "f", "namespace": "n", "arguments": "{}"},
                {"type": "custom_tool_call", "call_id": "c2", "name": "c", "input": "z"},
                {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "o"}]},
                {"type": "custom_tool_call_output", "call_id": "c2", "output": "o"},
            ],
        },
        {
            "model": "M", "max_output_tokens": 1, "tools": [{"type": "function", "name": "f"}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "input": [{"role": "user", "content": "x", "id": "msg_1"}], "user": "u", "prompt_cache_options": {"ttl": "30m"},
        },
    ),
}  # fmt: skip


def hostile_bodies(seed: int, model: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path, body) without end; the same for the same seed."""
    source = random.Random(seed)
    paths = list(BODIES)
    while True:
        path = source.choice(paths)
        body: Any = json.loads(json.dumps(source.choice(BODIES[path])).replace('"M"', json.dumps(model)))
        for _ in range(source.choice((0, 1, 1, 1, 2, 3, 8))):
            body = _changed(source, body)
        text = json.dumps(body, ensure_ascii=source.random() < 0.5).encode("utf-8", "surrogatepass")
        text = _DEEP_PLACE.sub(lambda found: b"[" * int(found[1]) + b"]" * int(found[1]), text)
        yield path, text if source.random() < 0.7 else mangled(source, text)


def _changed(source: random.Random, value: Any) -> Any:
    """Return a JSON value with one change somewhere in it."""
    if isinstance(value, dict) and value and source.random() < 0.85:
        key = source.choice(list(value))
        if source.random() < 0.1:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: _changed(source, value[key])}
    if isinstance(value, list) and value and source.random() < 0.7:
        place = source.randrange(len(value))
        if source.random() < 0.2:
            return value * source.choice((0, 2, 40))
        return [*value[:place], _changed(source, value[place]), *value[place + 1 :]]
    if source.random() < 0.15:
        return f"{_DEEP}{source.choice((3, 200, 900, 5000))}"
    return source.choice(ODD)


def mangled(source: random.Random, data: bytes) -> bytes:
    """Return bytes with some of them changed, cut out, doubled or put in."""
    made = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 5))):
        place = source.randrange(len(made) + 1)
        match source.randrange(5):
            case 0:
                del made[place:]
            case 1:
                del made[place : place + source.randrange(1, 9)]
            case 2:
                made[place:place] = source.randbytes(source.randrange(1, 9))
            case 3:
                made[place:place] = made[: source.randrange(len(made) + 1)][:200]
            case _ if place < len(made):
                made[place] = source.randrange(256)
            case _:
                pass
    return bytes(made)


def hostile_frames(seed: int, good: Sequence[Callable[[random.Random], bytes]]) -> Iterator[bytes]:
    """Yield serialised protobuf messages without end: good ones made by `good`, three in four of them mangled."""
    source = random.Random(seed)
    while True:
        frame = source.choice(good)(source)
        yield mangled(source, frame) if source.random() < 0.75 else frame
