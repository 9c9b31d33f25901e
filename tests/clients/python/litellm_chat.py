"""LiteLLM as a library, by OpenAI's chat, Anthropic's messages and OpenAI's responses: `litellm_chat.py URL MODEL`."""

import json
import sys
from typing import Any

import litellm

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def main(url: str, model: str) -> dict[str, Any]:
    def ask(words: str, **more: Any) -> Any:
        messages = [{"role": "user", "content": words}]
        return litellm.completion(f"openai/{model}", messages, api_base=f"{url}/v1", api_key="any", num_retries=0, **more)

    whole = ask("plain")
    chunks = list(ask("plain", stream=True, stream_options={"include_usage": True}))
    streamed = litellm.stream_chunk_builder(chunks)
    thoughts = ask("thoughts").choices[0].message
    calls = ask("both cities", tools=[TOOL]).choices[0].message.tool_calls
    messages = [{"role": "user", "content": "plain"}]
    message = litellm.completion(f"anthropic/{model}", messages, api_base=url, api_key="any", num_retries=0)
    response = litellm.responses("plain", f"openai/{model}", api_base=f"{url}/v1", api_key="any", num_retries=0)
    try:
        ask("plain", temperature=-1)
        refused = None
    except litellm.BadRequestError as error:
        refused = error.status_code
    return {
        "whole": [whole.choices[0].message.content, whole.usage.prompt_tokens_details.cached_tokens],
        "streamed": [streamed.choices[0].message.content, streamed.usage.prompt_tokens_details.cached_tokens],
        "thoughts": [thoughts.reasoning_content, thoughts.content],
        "calls": [[call.function.name, json.loads(call.function.arguments)] for call in calls],
        "message": [message.choices[0].message.content, message.usage.prompt_tokens_details.cached_tokens],
        "response": [response.output_text, response.usage.input_tokens_details.cached_tokens],
        "refused": refused,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
