"""What an answer must be: what is asked of it and of its tools, after the model's thoughts, as one grammar.

    asked                              an answer, after thoughts
    a call is forced                   calls, written as the model writes them (`text/call_grammars.py`)
    a constraint, no tools             what it says
    a constraint, and tools            calls, or what it says
    tools, some of which are strict    any text, and once a call begins calls of these tools

All other answers may be anything. Calls that are not forced are not bound where no mark of their own begins them, as in Llama's
and Python's styles.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator.live.asked import Asked, Conversation
from orchestrator.live.text.arguments import Tool
from orchestrator.live.text.call_grammars import Calls, calls_of
from orchestrator.live.text.conversations import tool_parameters
from orchestrator.live.text.grammars import Grammar, Part, Thoughts, Unkeepable, answer_part, whole
from orchestrator.live.text.models import ModelText
from orchestrator.live.text.styles import ToolStyle


def bound(asked: Asked, model: ModelText, prompt: str, opened: bool) -> Grammar | None:
    """Return what an answer must be, None if it may be anything.

    Args:
        asked: the whole request.
        model: whose answer.
        prompt: a conversation's; empty for a text.
        opened: the answer begins with thoughts.

    Raises:
        Unkeepable: it cannot be kept to that.
    """
    if not _binds(asked):  # as most are: then neither tools nor the prompt need be looked at
        return None
    part = answer_part(asked.constraint) if asked.constraint is not None else None
    if isinstance(asked.prompt, Conversation):
        grammar = _of_conversation(asked.prompt, part, model, _thoughts(asked.prompt, prompt, opened, model))
    else:
        assert part is not None, "a text is gone on with by what a constraint says alone"
        grammar = whole("@answer", (), (part,), part.field, Thoughts(), {})
    if grammar is not None:
        _check_tokens(asked, model, grammar)
    return grammar


def _binds(asked: Asked) -> bool:
    """Return whether anything is asked of the answer."""
    if asked.constraint is not None:
        return True
    if not isinstance(asked.prompt, Conversation):
        return False
    use = asked.prompt.tool_use
    return use.forced or bool(use.inputs) or any(_is_strict(tool) for tool in asked.prompt.tools or ())


def _is_strict(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function")
    return isinstance(function, Mapping) and cast("Mapping[str, Any]", function).get("strict") is True


def _of_conversation(conversation: Conversation, part: Part | None, model: ModelText, thoughts: Thoughts) -> Grammar | None:
    use, marks = conversation.tool_use, model.vocabulary.marks
    tools = [tool for tool in _tools(conversation) if use.name in ("", tool.name)]
    strict = [tool for tool in tools if tool.strict or tool.input is not None]
    calls = _calls(conversation, tools, model) if tools and (use.forced or strict or part is not None) else None
    said = thoughts.said("@answer", marks)
    if use.forced:
        if calls is None:
            problem = f"this model's calls cannot be forced (their style is {model.tool_style})" if tools else "needs tools"
            raise Unkeepable(use.field, problem)
        return whole(calls.forced, calls.rules, calls.parts, use.field, thoughts, marks)
    if part is not None:
        if calls is None:
            return whole(said, (), (part,), part.field, thoughts, marks)
        return whole(f"({calls.forced} | {said})", calls.rules, (part, *calls.parts), part.field, thoughts, marks)
    if calls is None or not calls.free:
        for tool in strict:
            if tool.input is not None:
                problem = f"can be kept to in forced calls alone: nothing tells where this model's begin ({model.tool_style})"
                raise Unkeepable(tool.input.field, problem)
        return None
    return whole(calls.free, (*calls.free_rules, *calls.rules), calls.parts, strict[0].field, thoughts, marks)


def _calls(conversation: Conversation, tools: Sequence[Tool], model: ModelText) -> Calls | None:
    """Return calls as rules, None if it is not known how the model writes them. Raises `Unkeepable`."""
    use, marks = conversation.tool_use, model.vocabulary.marks
    if not model.in_channels:
        return calls_of(model.tool_style, tools, use.parallel, marks)
    if conversation.continues:
        raise Unkeepable(use.field, "an answer that goes on with a message cannot be kept to calls: this model's are messages")
    return calls_of(ToolStyle.HARMONY, tools, use.parallel, marks)


def _tools(conversation: Conversation) -> list[Tool]:
    """Return what may be called."""
    use = conversation.tool_use
    fields = use.schema_fields or [use.schema_field.format(place) for place in range(len(conversation.tools or ()))]
    return [
        Tool(name, schema or None, _is_strict(one), fields[place], use.inputs.get(name))
        for place, one in enumerate(conversation.tools or ())
        for name, schema in tool_parameters([one]).items()
    ]


def _thoughts(conversation: Conversation, prompt: str, opened: bool, model: ModelText) -> Thoughts:
    """Return what an answer may begin with: a model that has no token for the first tag has not learnt to think so."""
    if model.in_channels:
        return Thoughts(in_channels=not conversation.continues)
    style = model.reasoning_style
    known = bool(style.marks) and model.tokenizer.token_to_id(style.marks[0]) is not None
    return Thoughts.after(prompt, style, opened, known)


def _check_tokens(asked: Asked, model: ModelText, grammar: Grammar) -> None:
    """Refuse an answer whose tokens could not keep to its grammar, or not end where that does."""
    if not model.spells:
        problem = "tokens of this model have no text of their own (`decoder` of its tokenizer.json): none can be kept to a form"
        raise Unkeepable(grammar.field, problem)
    if asked.limits.ignores_ends:
        raise Unkeepable("ignore_eos", f"cannot be combined with {grammar.field}: such an answer ends where it is whole")
    if asked.sampling.output_tokens_min:
        raise Unkeepable("min_tokens", f"cannot be combined with {grammar.field}: such an answer ends where it is whole")
    if not (model.chat_eos_token_ids if isinstance(asked.prompt, Conversation) else model.eos_token_ids):
        raise Unkeepable(grammar.field, "this model has no token that ends an answer, so that none can be kept to a form")
