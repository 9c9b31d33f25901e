"""Clients of Anthropic's API that are not Anthropic's Python one, Claude Code among them."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import Turn
from tests.clients.running import play, run_program
from tests.clients.test_chat import CALLS, script
from tests.live.scripted import MODEL, Script, Served, make_model

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return make_model(tmp_path_factory.mktemp("model"), context_tokens=100_000)


@pytest.mark.parametrize("program", ["anthropic_messages.mjs", "langchain_messages.py"])
def test_messages(text: ModelText, tmp_path: Path, program: str) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program(program, served.url, MODEL, home=tmp_path)
        assert told["whole"] == told["streamed"] == ["Hello world", 7]
        assert told["calls"] == CALLS
        if program == "anthropic_messages.mjs":
            assert told["stop"] == "tool_use"
            assert told["thoughts"] == ["Hm.", "Yes."]
            assert told["counted"] is True
            assert told["refused"] == [400, "invalid_request_error", True]
            assert told["models"] == [MODEL, "gpt-4o"]

    play(text, talk)


def test_claude_code_calls_a_tool_and_goes_on(text: ModelText, tmp_path: Path) -> None:
    command = "echo the tool said $((6 * 7))"

    def answer(turn: Turn) -> Script:
        prompt = text.tokenizer.decode(list(memoryview(turn.prompt.tokens).cast("I")))
        if "the tool said 42" in prompt:
            return Script(["It said 42."], cached_tokens=640)
        call = f'<tool_call>\n{{"name": "Bash", "arguments": {{"command": "{command}", "description": "Say it"}}}}\n</tool_call>'
        return Script(["I run it.\n", *call], cached_tokens=64)

    async def talk(served: Served) -> None:
        served.driver.script = answer
        told = await run_program("claude_code.mjs", served.url, "claude-opus-9", "Run a command, please.", home=tmp_path)
        assert (told["errors"], told["result"]) == (False, "It said 42.")
        assert told["calls"] == [["Bash", command]]
        assert told["results"] == ["the tool said 42"]
        first, second = served.driver.turns
        assert first.session is not None
        assert second.session == first.session
        # The context goes on: the blocks of the first prompt are the second's, but for the opening of an answer.
        same = sum(a == b for a, b in zip(first.prompt.hashes, second.prompt.hashes, strict=False))
        assert same >= len(first.prompt.hashes) - 1
        prompt = text.tokenizer.decode(list(memoryview(first.prompt.tokens).cast("I")))
        assert "x-anthropic-billing-header" not in prompt
        _check_usage(told["usage"], first, second)
        # It marks the system prompt and the last message that it has not written itself.
        assert [keep.seconds for keep in served.lives.asked] == [300.0, 300.0]

    play(text, talk)


def test_an_agent_of_claude_codes_forks_from_its_session(text: ModelText, tmp_path: Path) -> None:
    call = {"name": "Agent", "arguments": {"description": "Help", "prompt": "Look.", "subagent_type": "general-purpose"}}

    async def talk(served: Served) -> None:
        def answer(turn: Turn) -> Script:
            prompt = text.tokenizer.decode(list(memoryview(turn.prompt.tokens).cast("I")))
            if any(before.session != turn.session for before in served.driver.turns[:1]):
                return Script(["The helper has looked."])
            if "The helper has looked." in prompt:
                return Script(["All is well."])
            return Script([*f"<tool_call>\n{json.dumps(call)}\n</tool_call>"])

        served.driver.script = answer
        told = await run_program("claude_code.mjs", served.url, "claude-opus-9", "Look around, please.", home=tmp_path)
        assert (told["errors"], told["result"]) == (False, "All is well.")
        main, helper, after = (turn.session for turn in served.driver.turns)
        assert main == after != helper
        assert served.lives.begun == [(helper, main)]

    play(text, talk)


def _check_usage(usage: dict[str, Any], *turns: Turn) -> None:
    parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert sum(usage[part] for part in parts) == sum(turn.prompt.count for turn in turns)
    assert usage["cache_read_input_tokens"] == 64 + 640
