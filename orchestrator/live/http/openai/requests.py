"""What clients may ask in OpenAI's words: request bodies, their checks, and error bodies.

Unknown fields are ignored, never refused: harnesses send what other servers understand. JSON is read once, straight into these
structures; moving `cache_control` markers fall out by not being in them.

    ApiError    a request that cannot be served, with the status and the body to answer
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec

from orchestrator.core.types import ServiceClass
from orchestrator.live.http.openai.unserved import Unserved, unserved
from orchestrator.live.text.templates import decoded_arguments
from orchestrator.wire import node_pb2

MESSAGES_MAX = 100_000
STOP_STRINGS_MAX = 16
CHOICES_MAX = 128
PROMPTS_MAX = 1024
TOP_LOGPROBS_MAX = 20
TOOLS_MAX = 4096
_TOP_K_MAX = (1 << 31) - 1
#: OpenAI's default for completions; chat generates up to the context's end.
COMPLETION_TOKENS_DEFAULT = 16
#: Claude Code's first system line differs from request to request; kept, it would end every shared prefix there.
_BILLING_HEADER = "x-anthropic-billing-header"
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_SILENT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
_TYPES = {
    401: "invalid_request_error",
    403: "permission_error",
    429: "rate_limit_error",
    529: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request ends with this status and error body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """Return OpenAI's error object as JSON."""
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, fallback)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


class StreamOptions(msgspec.Struct):
    """How to stream."""

    include_usage: bool | None = None


class AgentHints(msgspec.Struct):
    """Dynamo's hints; the fields that are acted on."""

    priority: int | None = None


class AgentContext(msgspec.Struct):
    """Dynamo's naming of an agent's session."""

    session_id: str | None = None


class Extension(msgspec.Struct):
    """Dynamo's `nvext`; the fields that are acted on."""

    agent_hints: AgentHints | None = None
    agent_context: AgentContext | None = None
    cache_salt: str | None = None


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


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[Part | str] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    #: Some clients send an object here, which is none of ours.
    reasoning: Any = None


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
    logit_bias: dict[str, float] | None = None
    priority: int | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None
    nvext: Extension | None = None

    @property
    def choices(self) -> int:
        """Generations for each prompt."""
        return self.n if self.n is not None else 1

    @property
    def stops(self) -> Sequence[str]:
        """Strings that end the output."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def include_usage(self) -> bool:
        """A stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def salt(self) -> str:
        """What keeps this request's cached blocks apart from others of the same tenant."""
        return (self.nvext.cache_salt if self.nvext is not None else None) or self.cache_salt or ""

    @property
    def session_hint(self) -> str | None:
        """The session as the body names it, if it does."""
        context = self.nvext.agent_context if self.nvext is not None else None
        return (context.session_id if context is not None else None) or self.prompt_cache_key

    @property
    def urgency(self) -> int:
        """Priority: higher is served earlier."""
        hints = self.nvext.agent_hints if self.nvext is not None else None
        wanted = hints.priority if hints is not None and hints.priority is not None else self.priority
        return max(-(1 << 31), min(wanted or 0, (1 << 31) - 1))

    @property
    def service_class(self) -> ServiceClass:
        """The class that `service_tier` stands for: OpenAI's tiers, or one of ours by name."""
        tiers = {"flex": ServiceClass.BATCH, "priority": ServiceClass.INTERACTIVE}
        named = {str(member): member for member in ServiceClass}
        return (tiers | named).get(self.service_tier or "", ServiceClass.STANDARD)


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def output_tokens_wanted(self) -> int | None:
        """Tokens to generate at most, if the client says."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprobs_wanted(self) -> int | None:
        """Most likely tokens to report at each position; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template is told beside messages and tools."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with what begins an answer, rather than with the last message."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools the model is told about."""
        return None if self.tool_choice == "none" else self.tools or None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    logprobs: int | None = None

    @property
    def output_tokens_wanted(self) -> int | None:
        """Tokens to generate at most."""
        return self.max_tokens if self.max_tokens is not None else COMPLETION_TOKENS_DEFAULT

    @property
    def logprobs_wanted(self) -> int | None:
        """Most likely tokens to report at each position; None for no log probabilities at all."""
        return self.logprobs

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


Wanted = TypeVar("Wanted")
_CHAT = msgspec.json.Decoder(ChatRequest, strict=True)
_COMPLETION = msgspec.json.Decoder(CompletionRequest, strict=True)


def parse_chat(body: bytes) -> ChatRequest:
    """Read and check a chat request. Raises `ApiError`."""
    request = _decode(_CHAT, body)
    _check_common(request)
    require(len(request.messages) > 0, "messages", "must hold at least one message")
    require(len(request.messages) <= MESSAGES_MAX, "messages", f"must hold at most {MESSAGES_MAX} messages")
    _check_range("max_completion_tokens", request.max_completion_tokens, 1)
    _check_range("top_logprobs", request.top_logprobs, 0, TOP_LOGPROBS_MAX)
    require(request.top_logprobs is None or bool(request.logprobs), "top_logprobs", "needs logprobs to be true")
    _check_tools(request)
    _check_continuation(request)
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Read and check a completion request. Raises `ApiError`."""
    request = _decode(_COMPLETION, body)
    _check_common(request)
    _check_range("logprobs", request.logprobs, 0, TOP_LOGPROBS_MAX)
    require(request.best_of in (None, request.choices), "best_of", "only best_of equal to n is supported")
    prompts = request.prompts
    require(0 < len(prompts) <= PROMPTS_MAX, "prompt", f"must be 1 to {PROMPTS_MAX} prompts, is {len(prompts)}")
    require(all(prompts), "prompt", "must not be empty")
    return request


def _check_tools(request: ChatRequest) -> None:
    """Refuse tools that are none, and a choice among them that is not kept."""
    require(len(request.tools or ()) <= TOOLS_MAX, "tools", f"must be at most {TOOLS_MAX} tools")
    for place, tool in enumerate(request.tools or ()):
        if tool.get("type", "function") != "function":
            continue  # a tool that other servers run themselves; the template decides what to say of it
        function = tool.get("function")
        where = f"tools[{place}].function"
        require(isinstance(function, dict), where, "must be an object")
        named = cast("dict[str, Any]", function)
        require(isinstance(named.get("name"), str) and bool(named["name"]), f"{where}.name", "must be a name")
        require(isinstance(named.get("parameters"), dict | None), f"{where}.parameters", "must be an object, a JSON schema")
    match request.tool_choice:
        case None | "none" | "auto":
            return
        case "required":
            problem = "a call cannot be forced; only auto and none are served"
        case {"type": "function", "function": {"name": str(name)}}:
            known = name in tool_parameters(request.tools)
            problem = (
                f"a call of {name!r} cannot be forced; only auto and none are served"
                if known
                else f"{name!r} is none of the tools"
            )
        case _:
            problem = "must be auto or none"
    require(False, "tool_choice", problem)


def _check_continuation(request: ChatRequest) -> None:
    if not request.continue_final_message:
        return
    require(not request.add_generation_prompt, "continue_final_message", "cannot be combined with add_generation_prompt")
    final = request.messages[-1]
    text = final.content if isinstance(final.content, str) else _joined(final.content)
    require(bool(text.strip()), "continue_final_message", "needs a last message with text to go on with")
    require(not final.tool_calls, "continue_final_message", "cannot go on after tool calls")


def require(holds: bool, param: str, problem: str) -> None:
    """Raise the `ApiError` for a wrong field unless `holds`."""
    if not holds:
        raise ApiError(400, f"{param}: {problem}", code="invalid_value", param=param)


def _decode(decoder: "msgspec.json.Decoder[Wanted]", body: bytes) -> Wanted:
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            # JSON does not tell 4.0 from 4, and some clients' languages do not either.
            return msgspec.convert(_whole(msgspec.json.decode(body)), decoder.type)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").removeprefix(".") or None
        raise ApiError(400, f"{param}: {problem}" if param else problem, code="invalid_type", param=param) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


def _whole(body: Any) -> Any:
    """Return a body in which the numbers of its fields, and of lists of them, are whole where they can be."""
    if not isinstance(body, dict):
        return body
    fields = cast("dict[str, Any]", body)
    return {name: _integral(value) for name, value in fields.items()}


def _integral(value: Any) -> Any:
    if isinstance(value, list):
        return [_integral(one) for one in cast("list[Any]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_common(request: GenerationRequest) -> None:
    name = unserved(request)
    require(name is None, name or "", "is not served here; leave it out")
    _check_range("n", request.n, 1, CHOICES_MAX)
    _check_range("max_tokens", request.max_tokens, 1)
    _check_range("temperature", request.temperature, 0, 100)
    _check_range("top_p", request.top_p, 0, 1)
    _check_range("top_k", request.top_k, -1)
    _check_range("min_p", request.min_p, 0, 1)
    _check_range("presence_penalty", request.presence_penalty, -2, 2)
    _check_range("frequency_penalty", request.frequency_penalty, -2, 2)
    require(request.top_p is None or request.top_p > 0, "top_p", "must be over 0")
    require(len(request.stops) <= STOP_STRINGS_MAX, "stop", f"must be at most {STOP_STRINGS_MAX} strings")
    require(all(request.stops), "stop", "must not be empty")


def _check_range(param: str, value: float | None, least: float, most: float | None = None) -> None:
    """Refuse a number outside [least, most]; absent numbers are fine."""
    if value is None:
        return
    require(value >= least and (most is None or value <= most), param, _range_problem(value, least, most))


def _range_problem(value: float, least: float, most: float | None) -> str:
    return f"must be {least} or more, is {value}" if most is None else f"must be from {least} to {most}, is {value}"


def sampling_of(request: GenerationRequest, logprobs: int | None, vocabulary: int) -> node_pb2.Sampling:
    """Return how tokens are to be chosen. Raises `ApiError` for token ids outside the vocabulary."""
    sampling = node_pb2.Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        # More than any vocabulary has is all of it.
        top_k=min(max(request.top_k or 0, 0), _TOP_K_MAX),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
    )
    if request.seed is not None:
        sampling.seed = request.seed & 0xFFFF_FFFF_FFFF_FFFF
    if logprobs is not None:
        sampling.logprobs = logprobs
    for token in request.stop_token_ids or ():
        require(0 <= token < vocabulary, "stop_token_ids", f"{token} is no token id (0 to {vocabulary - 1})")
        sampling.stop_token_ids.append(token)
    for written, bias in (request.logit_bias or {}).items():
        known = written.isascii() and written.isdigit() and int(written) < vocabulary
        require(known, "logit_bias", f"{written!r} is no token id (0 to {vocabulary - 1})")
        require(-100 <= bias <= 100, "logit_bias", f"must be from -100 to 100, is {bias}")
        sampling.logit_bias[int(written)] = bias
    return sampling


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates read them: text content, parsed arguments, only the fields that are there."""
    return [_template_message(message) for message in messages]


def template_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools as chat templates read them, without cache markers, which move from turn to turn."""
    if tools is None:
        return None
    return [{key: value for key, value in tool.items() if key != "cache_control"} for tool in tools]


def tool_parameters(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """Return the functions among some tools by name, each with the schema of its parameters."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools or ():
        function = tool.get("function")
        if isinstance(function, Mapping) and "name" in function:
            function = cast("Mapping[str, Any]", function)
            parameters = function.get("parameters")
            found[str(function["name"])] = cast("Mapping[str, Any]", parameters) if isinstance(parameters, Mapping) else {}
    return found


def _template_message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = message.content if isinstance(message.content, str) else _joined(message.content)
    if role == "system" and _BILLING_HEADER in content:
        content = "".join(line for line in content.splitlines(keepends=True) if not line.startswith(_BILLING_HEADER))
    shown: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        shown["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        shown["name"] = message.name
    thoughts = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    if isinstance(thoughts, str):
        # Under both names that templates read.
        shown["reasoning_content"] = shown["thinking"] = thoughts
    return shown


def _joined(parts: Sequence[Part | str] | None) -> str:
    """Return the text of content given in parts. Raises `ApiError` for parts that are no text."""
    texts: list[str] = []
    for part in parts or ():
        if isinstance(part, str):
            texts.append(part)
        elif part.type in _TEXT_PARTS:
            texts.append(part.text or "")
        elif part.type == "refusal":
            texts.append(part.refusal or "")
        else:
            require(part.type in _SILENT_PARTS, "messages", f"content parts of type {part.type!r} are not supported")
    return "".join(texts)


def _template_call(call: MessageToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments or {}
    if isinstance(arguments, str):
        arguments = decoded_arguments(arguments)
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
