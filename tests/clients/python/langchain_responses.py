"""LangChain's model class over the Responses API, alone and in a LangGraph agent: `langchain_responses.py URL MODEL`."""

import json
import sys
from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent


@tool
def get_weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"{city}: 21 degrees"


def main(url: str, model: str) -> dict[str, Any]:
    base: dict[str, Any] = {"model": model, "base_url": f"{url}/v1", "api_key": "any", "max_retries": 0}
    chat = ChatOpenAI(**base, use_responses_api=True)
    whole = chat.invoke("plain")
    streamed: Any = None
    for chunk in chat.stream("plain"):
        streamed = chunk if streamed is None else streamed + chunk
    called = chat.bind_tools([get_weather]).invoke("both cities")
    kept = ChatOpenAI(**base, use_responses_api=True, use_previous_response_id=True)
    agent = create_react_agent(kept, [get_weather]).invoke({"messages": [("user", "agent")]})
    return {
        "whole": [whole.text, whole.usage_metadata],
        "streamed": [streamed.text, streamed.usage_metadata],
        "calls": [[call["name"], call["args"]] for call in called.tool_calls],
        "agent": [[message.type, message.text] for message in agent["messages"]],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
