"""Clients of the Responses API: what they send is understood, and what they get they understand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import Turn
from tests.clients.running import play, run_program
from tests.live.scripted import MODEL, Script, Served, make_model

pytestmark = pytest.mark.clients

#: Codex says more than the usual small model takes.
CONTEXT_TOKENS = 65_536
CALLS = [["get_weather", {"city": "London"}], ["get_weather", {"city": "Paris"}]]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


#: What the model says to the first of these that its prompt holds.
ANSWERS = {
    "CONTEXT CHECKPOINT COMPACTION": "So far: weft-42.",
    "weft-42": "It printed weft-42.",
    "say what it prints": "<think>\nI run it.\n</think>\n\nI will run it.\n" + call("exec_command", cmd="echo weft-$((6*7))"),
    "plain": "Hello world",
    "21 degrees": "It is warm.",
    "both cities": call("get_weather", city="London") + "\n" + call("get_weather", city="Paris"),
    "thoughts": "<think>\nHm.\n</think>\n\nYes.",
    "You hand over.": call("transfer_to_weather"),
    "agent": call("get_weather", city="London"),
    "a form": '{"name": "Oslo", "people": 717710}',
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return make_model(tmp_path_factory.mktemp("model"), CONTEXT_TOKENS)


def prompt_of(text: ModelText, turn: Turn) -> str:
    return text.tokenizer.decode(list(memoryview(turn.prompt.tokens).cast("I")))


def script(served: Served, text: ModelText) -> None:
    """Let the model answer by what its prompt holds."""

    def answer(turn: Turn) -> Script:
        prompt = prompt_of(text, turn)
        return Script([*next(said for word, said in ANSWERS.items() if word in prompt)], cached_tokens=7)

    served.driver.script = answer


def test_the_agents_sdk(text: ModelText, tmp_path: Path) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program("agents_sdk.py", served.url, MODEL, home=tmp_path)
        handed_over = [
            "handoff_call_item",
            "handoff_output_item",
            "tool_call_item",
            "tool_call_output_item",
            "message_output_item",
        ]
        assert told["whole"] == told["streamed"] == ["It is warm.", "Weather", handed_over]
        assert told["deltas"] == "It is warm."
        assert told["usage"] == [3, 21]
        assert told["kept"] == ["It is warm.", "Hello world"]
        assert told["form"] == ["Oslo", 717710]

    play(text, talk)


def test_langchain_and_langgraph(text: ModelText, tmp_path: Path) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program("langchain_responses.py", served.url, MODEL, home=tmp_path)
        assert told["whole"] == told["streamed"]
        assert told["whole"][0] == "Hello world"
        assert told["whole"][1]["input_token_details"]["cache_read"] == 7
        assert told["calls"] == CALLS
        assert told["agent"] == [["human", "agent"], ["ai", ""], ["tool", "London: 21 degrees"], ["ai", "It is warm."]]

    play(text, talk)


def test_openais_node_client(text: ModelText, tmp_path: Path) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program("openai_responses.mjs", served.url, MODEL, home=tmp_path)
        assert told["whole"] == told["streamed"] == ["Hello world", 7]
        assert told["calls"] == CALLS
        assert told["thoughts"] == ["Hm.", "Yes."]
        assert told["items"] == ["plain", "Hello world", "plain"]
        assert told["gone"] == 404
        assert told["refused"] == [400, "temperature"]

    play(text, talk)


def test_vercels_ai_sdk(text: ModelText, tmp_path: Path) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program("ai_sdk.mjs", served.url, MODEL, home=tmp_path)
        assert told["whole"] == told["streamed"] == ["Hello world", 7]
        assert told["agent"] == ["It is warm.", CALLS]
        assert told["thoughts"] == ["Hm.", "Yes."]
        assert told["form"] == {"name": "Oslo", "people": 717710}
        assert told["refused"] == 400

    play(text, talk)


def test_codex_runs_a_command_and_tells_what_it_printed(text: ModelText, tmp_path: Path) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program("codex.mjs", served.url, MODEL, "say what it prints", home=tmp_path)
        assert told == {
            "code": 0,
            "thoughts": ["I run it."],
            "commands": [["weft-42\n", 0]],
            "messages": ["I will run it.", "It printed weft-42."],
            "failures": [],
            "usage": 14,
        }
        first, second = served.driver.turns
        assert first.session is not None
        assert second.session == first.session
        assert second.prompt.hashes[: len(first.prompt.hashes)] == first.prompt.hashes

    play(text, talk)


def test_codex_compacts_its_context_and_goes_on(text: ModelText, tmp_path: Path) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program("codex.mjs", served.url, MODEL, "say what it prints", "20000", home=tmp_path)
        assert told["code"] == 0
        assert told["failures"] == []
        assert told["messages"][-1] == "It printed weft-42."
        asked, compacted, last = served.driver.turns
        assert {turn.session for turn in (asked, compacted, last)} == {asked.session}
        assert "CONTEXT CHECKPOINT COMPACTION" in prompt_of(text, compacted)
        assert "So far: weft-42." in prompt_of(text, last)

    play(text, talk)


def test_an_agent_of_codexs_forks_from_the_one_that_spawned_it(text: ModelText, tmp_path: Path) -> None:
    def answer(turn: Turn) -> Script:
        prompt = prompt_of(text, turn)
        if "ask a helper" not in prompt:
            return Script([*"A helper's word."])
        if "A helper's word." in prompt:
            return Script([*"It said so."])
        spawned = re.search(r'"agent_id":"([^"]*)"', prompt)
        if spawned is None:
            return Script([*call("multi_agent_v1__spawn_agent", message="give a word")])
        return Script([*call("multi_agent_v1__wait_agent", targets=[spawned[1]])])

    async def talk(served: Served) -> None:
        served.driver.script = answer
        told = await run_program("codex.mjs", served.url, MODEL, "ask a helper", home=tmp_path)
        assert told["messages"] == ["It said so."]
        main = served.driver.turns[0].session
        [helper] = {turn.session for turn in served.driver.turns} - {main}
        assert served.lives.begun == [(helper, main)]

    play(text, talk)
