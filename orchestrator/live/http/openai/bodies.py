"""Bodies of requests in OpenAI's words, as JSON is read into them; `requests.py` checks them and says what they ask for.

Unknown fields are ignored, never refused: harnesses send what other servers understand. Moving `cache_control` markers say how
long to keep a prompt, and are no part of it.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from orchestrator.live.http.openai.unserved import Unserved
from orchestrator.live.refusals import require


class StreamOptions(msgspec.Struct):
    """How to stream."""

    include_usage: bool | None = None
    #: vLLM's: with every event, if there is to be any usage.
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class AgentHints(msgspec.Struct):
    """Dynamo's hints; the fields that are acted on."""

    priority: int | None = None
    #: Ours: the longest beat, in seconds, that serves a request of class cadence.
    beat_s: float | None = None


class AgentContext(msgspec.Struct):
    """Dynamo's naming of an agent's session."""

    session_id: str | None = None


class Extension(msgspec.Struct):
    """Dynamo's `nvext`; the fields that are acted on."""

    agent_hints: AgentHints | None = None
    agent_context: AgentContext | None = None
    cache_salt: str | None = None
    #: As Anthropic's; whatever else is in it means nothing.
    cache_control: Any = None


class FunctionCall(msgspec.Struct):
    """A call an assistant made in an earlier turn."""

    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(msgspec.Struct):
    """A call with the id its result refers to."""

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class Part(msgspec.Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    cache_control: Any = None


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[Part | str] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    #: Older clients' one call.
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    #: Some clients send an object here, which is none of ours.
    reasoning: Any = None
    cache_control: Any = None

    @property
    def cache_markers(self) -> list[Any]:
        """What it says of caching the prompt up to it or to one of its parts."""
        parts = self.content if isinstance(self.content, list) else ()
        return [self.cache_control, *(part.cache_control for part in parts if isinstance(part, Part))]


class ThinkingSwitch(msgspec.Struct):
    """Whether to think before answering, as DeepSeek's and GLM's APIs ask for it."""

    type: str
    budget_tokens: int | None = None


class ReasoningWish(msgspec.Struct):
    """How much to think and whether to tell of it, as OpenRouter's API asks for it."""

    effort: str | None = None
    enabled: bool | None = None
    max_tokens: int | None = None
    exclude: bool | None = None


class GenerationRequest(Unserved, kw_only=True):
    """What chat and plain completions have in common."""

    model: str
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    #: vLLM's, kept or refused; -1 is none.
    thinking_token_budget: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    #: Of completions; chats that ask for it are refused.
    echo: bool | None = None
    priority: int | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Any = None
    cache_control: Any = None
    cache_salt: str | None = None
    nvext: Extension | None = None
    #: Of no consequence where there are no tools.
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    # What vLLM has beyond.
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    @property
    def cache_markers(self) -> list[Any]:
        """What is said of caching the prompt, in whatever form."""
        return [self.cache_control, self.nvext.cache_control if self.nvext is not None else None]

    @property
    def choices(self) -> int:
        """Generations for each prompt."""
        return self.n if self.n is not None else 1

    @property
    def stops(self) -> Sequence[str]:
        """Strings that end the output."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    #: Older clients' tools, and the choice among them.
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    #: The switch and tokens at most, as Qwen's API has them.
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    thinking: ThinkingSwitch | None = None
    reasoning: ReasoningWish | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def cache_markers(self) -> list[Any]:
        """What is said of caching the prompt, in whatever form; of messages and tools too."""
        own = [self.cache_control, self.nvext.cache_control if self.nvext is not None else None]
        for message in self.messages:
            if message.cache_control is not None or isinstance(message.content, list):
                own += message.cache_markers
        return [*own, *(tool.get("cache_control") for tool in self.tools)] if self.tools else own

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools the model is told about."""
        return None if self.tool_choice == "none" else self.tools


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [entry for entry in self.prompt if isinstance(entry, int)]
        if ids:
            require(len(ids) == len(self.prompt), "prompt", "a list of token ids must hold nothing else")
            return [ids]
        return [entry for entry in self.prompt if not isinstance(entry, int)]
