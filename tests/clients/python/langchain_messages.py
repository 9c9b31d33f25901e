"""LangChain's Anthropic model: URL and model are its arguments."""

import json
import sys

from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool


@tool
def get_weather(city: str) -> str:
    """Tell the weather."""
    return f"{city}: 21 degrees"


def main(url: str, model: str) -> None:
    chat = ChatAnthropic(model_name=model, base_url=url, api_key="any", max_tokens_to_sample=200, max_retries=0)
    whole = chat.invoke("plain")
    streamed = None
    for chunk in chat.stream("plain"):
        streamed = chunk if streamed is None else streamed + chunk
    called = chat.bind_tools([get_weather]).invoke("both cities")
    told = {
        "whole": [whole.text, whole.usage_metadata["input_token_details"]["cache_read"]],
        "streamed": [streamed.text, streamed.usage_metadata["input_token_details"]["cache_read"]],
        "calls": [[call["name"], call["args"]] for call in called.tool_calls],
    }
    print(json.dumps(told))


main(*sys.argv[1:])
