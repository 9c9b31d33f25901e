"""Clients of OpenAI's chat that are not OpenAI's Python one: what they send is understood, and what they get they understand."""

from pathlib import Path

import pytest

from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import Turn
from tests.clients.running import play, run_program
from tests.live.scripted import MODEL, Script, Served, make_model

pytestmark = pytest.mark.clients

CALL = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
CALLS = [["get_weather", {"city": "London"}], ["get_weather", {"city": "Paris"}]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return make_model(tmp_path_factory.mktemp("model"))


def answers() -> dict[str, str]:
    """Return what the model says to the last message that holds a word."""
    return {
        "21 degrees": "It is warm.",
        "both cities": CALL.format("London") + "\n" + CALL.format("Paris"),
        "thoughts": "<think>\nHm.\n</think>\n\nYes.",
        "agent": CALL.format("London"),
        "plain": "Hello world",
    }


def script(served: Served, text: ModelText) -> None:
    """Let the model answer by what its prompt holds."""

    def answer(turn: Turn) -> Script:
        prompt = text.tokenizer.decode(list(memoryview(turn.prompt.tokens).cast("I")))
        return Script([*next(said for word, said in answers().items() if word in prompt)], cached_tokens=7)

    served.driver.script = answer


@pytest.mark.parametrize("program", ["litellm_chat.py", "openai_chat.mjs"])
def test_chat(text: ModelText, tmp_path: Path, program: str) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program(program, served.url, MODEL, home=tmp_path)
        assert told["whole"] == told["streamed"] == ["Hello world", 7]
        assert told["calls"] == CALLS
        for way in ("message", "response"):
            assert told.get(way) in (None, ["Hello world", 7])
        if "thoughts" in told:
            assert told["thoughts"] == ["Hm.", "Yes."]
        if "models" in told:
            assert told["models"] == [MODEL, "gpt-4o"]
        assert told["refused"] in (400, [400, "temperature"])

    play(text, talk)


def test_langchain_and_langgraph(text: ModelText, tmp_path: Path) -> None:
    async def talk(served: Served) -> None:
        script(served, text)
        told = await run_program("langchain_chat.py", served.url, MODEL, home=tmp_path)
        assert told["whole"][0] == told["streamed"][0] == "Hello world"
        assert told["whole"][1] == told["streamed"][1]
        assert told["whole"][1]["input_token_details"] == {"cache_read": 7}
        assert told["calls"] == CALLS
        assert told["agent"] == [["human", "agent"], ["ai", ""], ["tool", "London: 21 degrees"], ["ai", "It is warm."]]

    play(text, talk)
