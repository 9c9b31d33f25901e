"""OpenAI's Agents SDK, whose models speak the Responses API: `agents_sdk.py URL MODEL`.

One agent hands a question over to another, which calls a tool; then the same as a stream, once more with the server keeping the
conversation, and an answer of a form.
"""

import asyncio
import json
import sys
from typing import Any

from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel


class City(BaseModel):
    name: str
    people: int


@function_tool
def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"{city}: 21 degrees"


async def main(url: str, model: str) -> dict[str, Any]:
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0), use_for_tracing=False)
    settings = ModelSettings(parallel_tool_calls=True, truncation="auto", response_include=["reasoning.encrypted_content"])
    weather = Agent(
        name="Weather", instructions="You know the weather.", model=model, tools=[get_weather], model_settings=settings
    )
    triage = Agent(name="Triage", instructions="You hand over.", model=model, handoffs=[weather])

    whole = await Runner.run(triage, "agent")
    stream = Runner.run_streamed(triage, "agent")
    deltas = ""
    async for event in stream.stream_events():
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent):
            deltas += event.data.delta
    first = await Runner.run(weather, "both cities", previous_response_id=None, auto_previous_response_id=True)
    second = await Runner.run(weather, "plain", previous_response_id=first.last_response_id)
    form = await Runner.run(Agent(name="Form", model=model, output_type=City), "a form")
    usage = whole.context_wrapper.usage
    return {
        "whole": [whole.final_output, whole.last_agent.name, [item.type for item in whole.new_items]],
        "streamed": [stream.final_output, stream.last_agent.name, [item.type for item in stream.new_items]],
        "deltas": deltas,
        "usage": [usage.requests, usage.input_tokens_details.cached_tokens],
        "kept": [first.final_output, second.final_output],
        "form": [form.final_output.name, form.final_output.people],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
