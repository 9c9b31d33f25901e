"""LangChain's model classes, and a LangGraph agent with a tool: `langchain_chat.py URL MODEL`."""

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
    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="any", max_retries=0)
    whole = chat.invoke("plain")
    streamed: Any = None
    for chunk in chat.stream("plain", stream_usage=True):
        streamed = chunk if streamed is None else streamed + chunk
    called = chat.bind_tools([get_weather]).invoke("both cities")
    agent = create_react_agent(chat, [get_weather]).invoke({"messages": [("user", "agent")]})
    return {
        "whole": [whole.content, whole.usage_metadata],
        "streamed": [streamed.content, streamed.usage_metadata],
        "calls": [[call["name"], call["args"]] for call in called.tool_calls],
        "agent": [[message.type, message.content] for message in agent["messages"]],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
