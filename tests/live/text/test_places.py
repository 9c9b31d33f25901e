"""Places of conversations are found in their prompts, however templates show them; or they are said to be unknown."""

from typing import Any

import pytest

from orchestrator.live.asked import Breakpoint, Conversation
from orchestrator.live.text.places import places
from orchestrator.live.text.templates import ChatTemplate
from workers.engines.vocabulary import CHAT_TEMPLATE

#: White space around contents is left out, tools come first, and of their schemas only what is in them.
TRIMMING = (
    "{% for t in tools %}[{{ t.function.name }}: {{ t.function.parameters | tojson(indent=2) }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
)
#: Tools are named alone.
NAMING = "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }};{% endfor %}"
#: What is marked is refused.
LOOKING = "{% for m in messages %}{{ raise_exception('odd') if 'PLACE' in m.content }}{{ m.content }}{% endfor %}"
#: What is marked is shown in other words.
SHOUTING = "{% for m in messages %}{{ m.content | lower }}{% endfor %}"

#: Tools come before the last message of the user's, as Mistral's templates have it; without one nothing is shown.
LATE = (
    "{% if messages[-1].role != 'user' %}{{ raise_exception('no user') }}{% endif %}{% for m in messages %}"
    "{% if loop.last %}{{ tools | tojson }}{% endif %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Weave. \n"},
    {"role": "user", "content": "Warp and \nweft "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "More"},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {name: {}}}}}
    for name in ("first", "second")
]


def found(source: str, *sought: Breakpoint) -> list[str]:
    """Return what of the prompt comes before some places."""
    template = ChatTemplate({"default": source}, {})
    conversation = Conversation(MESSAGES, TOOLS)
    text = template.render(MESSAGES, TOOLS)
    return [text[:end] for end in places(template, text, conversation, {}, sought)]


def behind(place: int, chars: int | None = None) -> Breakpoint:
    return Breakpoint(300.0, place, chars)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TRIMMING])
def test_places_in_messages_are_where_the_template_shows_what_is_before_them(source: str) -> None:
    sought = [behind(0, 9), behind(1, 9), behind(1, 15), behind(2, 0), behind(3, 4)]
    prompts = found(source, *sought)
    ends = ["Weave.", "Warp and", "weft", "assistant\n" if source is CHAT_TEMPLATE else "<assistant>", "More"]
    assert [prompt[-len(end) :] for prompt, end in zip(prompts, ends, strict=True)] == ends
    assert sorted(prompts, key=len) == prompts


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TRIMMING, LATE])
def test_a_place_behind_a_tool_is_where_its_schema_ends(source: str) -> None:
    first, second = found(source, behind(0), behind(1))
    for prompt, shown, hidden in ((first, '"first"', "second"), (second, '"second"', "More")):
        assert shown in prompt
        assert hidden not in prompt
    assert first == second[: len(first)]


def test_places_of_one_message_and_of_tools_are_found_together() -> None:
    tool, message = found(CHAT_TEMPLATE, behind(1), behind(1, 4))
    assert tool.endswith('"properties": {"second": {}}')
    assert message.endswith("Warp")


@pytest.mark.parametrize(("source", "sought"), [(NAMING, behind(0)), (LOOKING, behind(1, 4)), (SHOUTING, behind(1, 4))])
def test_what_a_template_does_not_show_as_it_is_is_found_nowhere(source: str, sought: Breakpoint) -> None:
    assert found(source, sought) == [""]
