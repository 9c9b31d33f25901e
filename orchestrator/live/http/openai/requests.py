"""Reads what clients ask in OpenAI's words: a body in, checked, what is asked out.

`parse_chat` and `parse_completion` return what is asked in no API's words (`live/asked.py`), or raise `Invalid`. JSON is read
once, straight into the structures of `bodies.py`, which nobody else sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from operator import attrgetter
from typing import Any, TypeVar, cast

import msgspec

from orchestrator.core.config import PRIORITY_MAX
from orchestrator.core.types import SEED_MASK, Sampling, ServiceClass
from orchestrator.live.asked import (
    AS_IT_LIKES,
    THINKS_AS_EVER,
    TOP_K_MAX,
    Asked,
    Conversation,
    Effort,
    Hints,
    Limits,
    Report,
    Texts,
    Thinking,
    ToolUse,
)
from orchestrator.live.http.openai.bodies import (
    ChatRequest,
    CompletionRequest,
    Extension,
    GenerationRequest,
    Message,
    Part,
    ReasoningWish,
    StreamOptions,
)
from orchestrator.live.http.openai.constraints import constraint_of
from orchestrator.live.http.openai.legacy import FUNCTIONS, modernise
from orchestrator.live.http.openai.unserved import unserved
from orchestrator.live.http.reading import check_range, decode
from orchestrator.live.http.retention import retention_s
from orchestrator.live.refusals import Invalid, require
from orchestrator.live.text.conversations import shown_call, shown_message, shown_tools, tool_parameters

MESSAGES_MAX = 100_000
STOP_STRINGS_MAX = 16
BAD_WORDS_MAX = 256
CHOICES_MAX = 128
PROMPTS_MAX = 1024
TOP_LOGPROBS_MAX = 20
TOOLS_MAX = 4096
#: OpenAI's default for completions; chat generates up to the context's end.
COMPLETION_TOKENS_DEFAULT = 16
#: More digits than any token id has.
_TOKEN_DIGITS_MAX = 10
#: The least and the most of numbers in both kinds of bodies.
_RANGES: Mapping[str, tuple[float, float | None]] = {
    "n": (1, CHOICES_MAX),
    "max_tokens": (0, None),
    "prompt_logprobs": (0, TOP_LOGPROBS_MAX),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, None),
    "min_p": (0, 1),
    "min_tokens": (0, None),
    "repetition_penalty": (0, 100),
    "truncate_prompt_tokens": (-1, None),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_ranged = attrgetter(*_RANGES)
_NO_NUMBERS = (None,) * len(_RANGES)
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
_SILENT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
#: OpenAI's tiers, and our classes by name; any other tier is the default's.
_CLASSES = {"flex": ServiceClass.BATCH, "priority": ServiceClass.INTERACTIVE} | {str(one): one for one in ServiceClass}
_EFFORTS = tuple(Effort)
_NO_WISH = ReasoningWish()
#: Kept, or refused where it cannot be.
KEPT_BUDGET = "thinking_token_budget"
_thoughts = attrgetter("thinking", "reasoning", "reasoning_effort", "enable_thinking", "thinking_budget", KEPT_BUDGET)
#: What most requests say of thoughts.
_NO_THOUGHTS = (None,) * 6
_SWITCHED = {"enabled": True, "disabled": False, "auto": None, "adaptive": None}

Said = TypeVar("Said")
_CHAT = msgspec.json.Decoder(ChatRequest, strict=True)
_COMPLETION = msgspec.json.Decoder(CompletionRequest, strict=True)
_NO_EXTENSION = Extension()
_NO_OPTIONS = StreamOptions()
#: What requests say of how to tell the answer, and of when and where to serve it: most say nothing.
_reported = attrgetter(
    "stream", "stream_options", "skip_special_tokens", "return_token_ids", "echo", "prompt_logprobs", "return_tokens_as_token_ids"
)
_NOTHING_REPORTED = (None,) * 7
_PLAIN_REPORT = Report()
_hinted = attrgetter("priority", "service_tier", "nvext", "prompt_cache_key", "cache_salt", "prompt_cache_retention")
_NOT_HINTED = (None,) * 6
_NO_HINTS = Hints()


def parse_chat(body: bytes) -> Asked:
    """Read and check a body of /v1/chat/completions. Raises `Invalid`."""
    request = decode(_CHAT, body)
    functions = modernise(request)
    check_common(request)
    most = request.max_tokens
    if most is not None:
        check_range("max_tokens", most, 1)
    if request.max_completion_tokens is not None:
        most = request.max_completion_tokens
        check_range("max_completion_tokens", most, 1)
    require(not request.echo, "echo", "is not served in chats; leave it out")
    if request.top_logprobs is not None:
        check_range("top_logprobs", request.top_logprobs, 0, TOP_LOGPROBS_MAX)
        require(bool(request.logprobs), "top_logprobs", "needs logprobs to be true")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    hidden = request.include_reasoning is False or (request.reasoning is not None and request.reasoning.exclude)
    asked = asked_of(request, conversation_of(request), most, logprobs, not hidden)
    return replace(asked, origin=FUNCTIONS) if functions else asked


def parse_completion(body: bytes) -> Asked:
    """Read and check a body of /v1/completions. Raises `Invalid`."""
    request = decode(_COMPLETION, body)
    check_common(request)
    check_range("logprobs", request.logprobs, 0, TOP_LOGPROBS_MAX)
    require(request.thinking_token_budget in (None, -1), KEPT_BUDGET, "limits the thoughts of conversations")
    require(request.best_of in (None, request.choices), "best_of", "only best_of equal to n is supported")
    prompts = request.prompts
    require(0 < len(prompts) <= PROMPTS_MAX, "prompt", f"must be 1 to {PROMPTS_MAX} prompts, is {len(prompts)}")
    require(all(prompts), "prompt", "must not be empty")
    most = request.max_tokens if request.max_tokens is not None else COMPLETION_TOKENS_DEFAULT
    require(most > 0 or bool(request.echo), "max_tokens", "must be 1 or more, unless the prompt is echoed")
    texts = Texts(prompts, prefixed=request.add_special_tokens is not False)
    return asked_of(request, texts, most, request.logprobs, thoughts=True)


# --- in no API's words ------------------------------------------------------------------------------------------------


def asked_of(
    request: GenerationRequest, prompt: Conversation | Texts, output_tokens_max: int | None, logprobs: int | None, thoughts: bool
) -> Asked:
    """Return what a checked request asks for."""
    if (least := request.min_tokens) and output_tokens_max is not None:
        require(least <= output_tokens_max, "min_tokens", f"is {least}, over {output_tokens_max} at most")
    return Asked(
        model=request.model,
        prompt=prompt,
        sampling=_sampling(request, logprobs),
        limits=_limits(request, output_tokens_max),
        hints=_hints(request),
        report=_report(request, thoughts),
        constraint=constraint_of(request),
    )


def _limits(request: GenerationRequest, output_tokens_max: int | None) -> Limits:
    kept = request.truncate_prompt_tokens
    return Limits(
        output_tokens_max=output_tokens_max,
        stop_strings=request.stops,
        includes_ends=bool(request.include_stop_str_in_output),
        ignores_ends=bool(request.ignore_eos),
        forbidden_words=request.bad_words or (),
        # vLLM's -1 is as many as there is room for.
        prompt_tokens_max=None if kept is None else max(kept, 0),
        choices=request.choices,
    )


def _report(request: GenerationRequest, thoughts: bool) -> Report:
    if thoughts and _reported(request) == _NOTHING_REPORTED:
        return _PLAIN_REPORT
    options = request.stream_options or _NO_OPTIONS
    usage = bool(options.include_usage)
    return Report(
        streams=bool(request.stream),
        usage=usage,
        thoughts=thoughts,
        special_tokens=request.skip_special_tokens is False,
        token_ids=bool(request.return_token_ids),
        echoes=bool(request.echo),
        prompt_scores=request.prompt_logprobs is not None,
        tokens_by_id=bool(request.return_tokens_as_token_ids),
        usage_each=usage and bool(options.continuous_usage_stats),
        padded=bool(options.include_obfuscation),
    )


def _sampling(request: GenerationRequest, logprobs: int | None) -> Sampling:
    scored = request.prompt_logprobs is not None or request.echo
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        # -1 is all, as 0 is, and so is more than any vocabulary has.
        top_k=min(max(request.top_k, 0), TOP_K_MAX) if request.top_k else 0,
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=None if request.seed is None else request.seed & SEED_MASK,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=logprobs,
        logit_bias=_biases(request.logit_bias) if request.logit_bias else {},
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        output_tokens_min=request.min_tokens or 0,
        allowed_token_ids=tuple(request.allowed_token_ids or ()),
        prompt_logprobs=_prompt_logprobs(request, logprobs) if scored else None,
    )


def _prompt_logprobs(request: GenerationRequest, logprobs: int | None) -> int | None:
    """Return how many likely tokens of each of the prompt's to tell: what is echoed has as many as what is generated."""
    echoed = logprobs if request.echo else None
    asked = [count for count in (request.prompt_logprobs, echoed) if count is not None]
    return max(asked, default=None)


def _biases(written: Mapping[str, float]) -> dict[int, float]:
    """Return biases by token id, whether or not the model has such tokens. Raises `Invalid`."""
    for token, bias in written.items():
        number = token.isascii() and token.isdigit() and len(token) <= _TOKEN_DIGITS_MAX
        require(number, "logit_bias", f"{token[:_TOKEN_DIGITS_MAX]!r} is no token id")
        require(-100 <= bias <= 100, "logit_bias", f"must be from -100 to 100, is {bias}")
    return {int(token): bias for token, bias in written.items()}


def _hints(request: GenerationRequest) -> Hints:
    """Return the hints of OpenAI's fields and Dynamo's; Dynamo's come first."""
    markers = request.cache_markers
    if _hinted(request) == _NOT_HINTED and not any(markers):
        return _NO_HINTS
    more, priority = request.nvext or _NO_EXTENSION, request.priority
    if more.agent_hints is not None and more.agent_hints.priority is not None:
        priority = more.agent_hints.priority
    named = more.agent_context.session_id if more.agent_context is not None else None
    tier = request.service_tier
    return Hints(
        priority=max(-PRIORITY_MAX - 1, min(priority, PRIORITY_MAX)) if priority else 0,
        service_class=_CLASSES.get(tier, ServiceClass.STANDARD) if tier is not None else None,
        beat_s_max=_beat_s_max(more),
        session=named or request.prompt_cache_key or None,
        cache_salt=more.cache_salt or request.cache_salt or "",
        retention_s=retention_s(markers, request.prompt_cache_retention),
    )


def _beat_s_max(more: Extension) -> float:
    """Return the longest beat that is asked for, 0.0 if none is. Raises `Invalid`."""
    beat_s = more.agent_hints.beat_s if more.agent_hints is not None else None
    if beat_s is None:
        return 0.0
    require(0 < beat_s < inf, "nvext.agent_hints.beat_s", f"must be over 0 seconds, is {beat_s}")
    return beat_s


def conversation_of(request: ChatRequest) -> Conversation:
    """Return what a chat's prompt is made of. Raises `Invalid`."""
    require(len(request.messages) > 0, "messages", "must hold at least one message")
    require(len(request.messages) <= MESSAGES_MAX, "messages", f"must hold at most {MESSAGES_MAX} messages")
    if request.tools or request.tool_choice is not None:
        _check_tools(request)
    if request.continue_final_message:
        _check_continuation(request)
    told = request.chat_template_kwargs or {}
    if request.documents is not None:
        told = {"documents": request.documents, **told}
    return Conversation(
        messages=[_message(message) for message in request.messages],
        tools=shown_tools(request.shown_tools),
        tool_use=_tool_use(request),
        variables=told,
        opens_answer=request.add_generation_prompt is not False and not request.continue_final_message,
        continues=bool(request.continue_final_message),
        prefixed=bool(request.add_special_tokens),
        thinking=_thinking(request),
    )


def _thinking(request: ChatRequest) -> Thinking:
    """Return how much the model is to think: by whichever fields say so. Raises `Invalid`."""
    if _thoughts(request) == _NO_THOUGHTS:
        return THINKS_AS_EVER
    switch, wish = request.thinking, request.reasoning or _NO_WISH
    require(switch is None or switch.type in _SWITCHED, "thinking.type", f"must be one of {', '.join(_SWITCHED)}")
    switched = _SWITCHED[switch.type] if switch is not None else None
    efforts = {"reasoning_effort": request.reasoning_effort, "reasoning.effort": wish.effort}
    switches = {"enable_thinking": request.enable_thinking, "thinking.type": switched, "reasoning.enabled": wish.enabled}
    for field, effort in efforts.items():
        require(effort is None or effort in _EFFORTS, field, f"must be one of {', '.join(_EFFORTS)}, is {effort!r}")
    effort_field, effort = _only(efforts, "reasoning_effort")
    field, enabled = _only(switches, effort_field)
    require(not (enabled and effort == Effort.NONE), field, f"thinking is switched on, and {effort_field} is none")
    kept = kept_budget(request)
    budgets = {
        KEPT_BUDGET: kept,
        "thinking_budget": request.thinking_budget,
        "thinking.budget_tokens": switch.budget_tokens if switch is not None else None,
        "reasoning.max_tokens": wish.max_tokens,
    }
    for name, tokens in budgets.items():
        check_range(name, tokens, 0, TOP_K_MAX)
    _, budget = _only(budgets, KEPT_BUDGET)
    return Thinking(enabled, None if effort is None else Effort(effort), budget, field, KEPT_BUDGET if kept is not None else "")


def kept_budget(request: GenerationRequest) -> int | None:
    """Return how many tokens of thoughts there may be to the letter, None for any number. Raises `Invalid`."""
    budget = request.thinking_token_budget
    check_range(KEPT_BUDGET, budget, -1, TOP_K_MAX)
    return budget if budget != -1 else None


def _only(fields: Mapping[str, Said | None], default: str) -> tuple[str, Said | None]:
    """Return which of several fields for one thing is there, and what it says. Raises `Invalid` if they say different things."""
    said = {name: value for name, value in fields.items() if value is not None}
    first = next(iter(said), default)
    other = next((name for name, value in said.items() if value != said[first]), None)
    require(other is None, other or "", f"contradicts {first}")
    return first, said.get(first)


def _message(message: Message) -> dict[str, Any]:
    content = message.content if isinstance(message.content, str) else _joined(message.content)
    thoughts = message.reasoning_content if message.reasoning_content is not None else message.reasoning
    thoughts = thoughts if isinstance(thoughts, str) else None
    return shown_message(message.role, content, message.name, _calls(message), message.tool_call_id, thoughts)


def _calls(message: Message) -> list[dict[str, Any]] | None:
    if not message.tool_calls:
        return None
    return [shown_call(one.function.name, one.function.arguments, one.id, one.type) for one in message.tool_calls]


def _joined(parts: Sequence[Part | str] | None) -> str:
    """Return the text of content given in parts. Raises `Invalid` for parts that are no text."""
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


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_tools(request: ChatRequest) -> None:
    """Refuse tools that are none, and a choice among them that is not kept."""
    require(len(request.tools or ()) <= TOOLS_MAX, "tools", f"must be at most {TOOLS_MAX} tools")
    for place, tool in enumerate(request.tools or ()):
        require(tool.get("type") != "custom", f"tools[{place}]", "custom tools are served in /v1/responses, not here")
        if tool.get("type", "function") != "function":
            continue  # a tool that other servers run themselves; the template decides what to say of it
        function = tool.get("function")
        where = f"tools[{place}].function"
        require(isinstance(function, dict), where, "must be an object")
        named = cast("dict[str, Any]", function)
        require(isinstance(named.get("name"), str) and bool(named["name"]), f"{where}.name", "must be a name")
        require(isinstance(named.get("parameters"), dict | None), f"{where}.parameters", "must be an object, a JSON schema")


def _tool_use(request: ChatRequest) -> ToolUse:
    """Return what is to be done with tools. Raises `Invalid`."""
    parallel = request.parallel_tool_calls is not False
    match request.tool_choice:
        case None | "none" | "auto":
            return AS_IT_LIKES if parallel else ToolUse(parallel=False)
        case "required":
            return ToolUse(forced=True, parallel=parallel)
        case {"type": "function", "function": {"name": str(name)}}:
            require(name in tool_parameters(request.tools), "tool_choice", f"{name!r} is none of the tools")
            return ToolUse(forced=True, name=name, parallel=parallel)
        case _:
            raise Invalid("tool_choice: must be auto, none, required or a function's name", "invalid_value", "tool_choice")


def _check_continuation(request: ChatRequest) -> None:
    """Refuse to go on with a last message that has nothing to go on with."""
    require(not request.add_generation_prompt, "continue_final_message", "cannot be combined with add_generation_prompt")
    final = request.messages[-1]
    text = final.content if isinstance(final.content, str) else _joined(final.content)
    require(bool(text.strip()), "continue_final_message", "needs a last message with text to go on with")
    require(not final.tool_calls, "continue_final_message", "cannot go on after tool calls")


def check_common(request: GenerationRequest) -> None:
    """Refuse what no kind of request may ask for. Raises `Invalid`."""
    if (name := unserved(request)) is not None:
        require(False, name, "is not served here; leave it out")
    if (numbers := _ranged(request)) != _NO_NUMBERS:
        for (param, (least, most)), value in zip(_RANGES.items(), numbers, strict=True):
            if value is not None:
                check_range(param, value, least, most)
        require(request.top_p != 0, "top_p", "must be over 0")
        require(request.repetition_penalty != 0, "repetition_penalty", "must be over 0")
        kept = request.truncate_prompt_tokens
        require(kept != 0, "truncate_prompt_tokens", "must leave tokens; -1 is as many as there is room for")
        scored = request.prompt_logprobs is not None
        require(not (scored and request.stream), "prompt_logprobs", "cannot be combined with stream")
    require(request.allowed_token_ids != [], "allowed_token_ids", "must not be empty")
    if words := request.bad_words:
        require(len(words) <= BAD_WORDS_MAX, "bad_words", f"must be at most {BAD_WORDS_MAX} words")
        require(all(words), "bad_words", "must not be empty")
    if stops := request.stops:
        require(len(stops) <= STOP_STRINGS_MAX, "stop", f"must be at most {STOP_STRINGS_MAX} strings")
        require(all(stops), "stop", "must not be empty")
