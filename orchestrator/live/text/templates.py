"""A model's chat template: messages and tools in, the prompt's text out, letter for letter as `transformers` renders it.

Templates come with checkpoints and are given what clients write, so they run in jinja2's immutable sandbox and within bounds:
they end, and what they make is no larger than a prompt can be. They are rendered whole on every turn: that is string joining, and
the part of a turn that could not be shown to depend on its new messages alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import jinja2
import msgspec
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from orchestrator.live.text.reasoning import CHANNEL
from orchestrator.live.text.splitting import one_by_one
from orchestrator.profiles.fields import CheckpointError, Fields, read_text
from orchestrator.profiles.specials import special_tokens

#: Attributes of a dict that a template may mean by `message.items`; every other name can only be a key.
_DICT_ATTRIBUTES = frozenset(dir(dict))


_PLAIN_JSON = json.JSONEncoder(ensure_ascii=False)


#: Rounds of all loops and calls of macros in one rendering: some seconds. The longest conversations take some hundred thousand.
ROUNDS_MAX = 1_000_000
#: Characters of a prompt, or of anything that a template multiplies; far beyond what any model's context holds.
TEXT_CHARS_MAX = 1 << 26
_EXPONENT_MAX = 64
#: Parts of a text that are joined at once while its length is watched.
_PARTS_JOINED = 4096
#: Marks where the last message ends, to be cut off there; `transformers` uses the same, with the space that templates trim.
_CUT_HERE = "CONTINUE_FINAL_MESSAGE_TAG "

#: Tool calls come again with every later turn of their conversation: so many arguments are kept decoded, if not longer.
_ARGUMENTS_KEPT_MAX = 16_384
_ARGUMENTS_KEPT_CHARS_MAX = 4096


class TemplateFailed(ValueError):
    """The template refused these messages (its own words) or could not render them."""


class _GenerationBlocks(Extension):
    """Renders `{% generation %}`, which marks what a model wrote for training, as the plain text inside it."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with short ways to what templates do once per message: read a dict's keys and call their own macros.

    Every loop is over what `_counted` returns of it, calls of macros count as rounds, and what is multiplied stays small.
    """

    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"*", "**"})  # pyright: ignore[reportIncompatibleVariableOverride]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            # A filter, because those are called without being looked at by the sandbox.
            loop.iter = nodes.Filter(loop.iter, _ROUNDS, [], [], None, None).set_lineno(loop.lineno, override=False)
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and right > _EXPONENT_MAX:
            raise jinja2.exceptions.SecurityError(f"exponents are at most {_EXPONENT_MAX}")
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > TEXT_CHARS_MAX:  # pyright: ignore[reportUnknownArgumentType]
                raise jinja2.exceptions.SecurityError(f"the chat template multiplies a text beyond {TEXT_CHARS_MAX} characters")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]  # pyright: ignore[reportUnknownVariableType]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)  # pyright: ignore[reportUnknownArgumentType]
        return super().getattr(obj, attribute)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is Macro:
            __context.parent[_ROUNDS].count(())
            kwargs.pop("_block_vars", None)
            kwargs.pop("_loop_vars", None)
            return __obj(__context.eval_ctx, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


#: Names the filter that counts a loop's rounds, and the variable that holds those left.
_ROUNDS = "_rounds"


class _Rounds:
    """The rounds that one rendering may still take."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = ROUNDS_MAX

    def count(self, items: Any) -> Any:
        """Return what a loop goes over. Raises `SecurityError` if that is too much."""
        try:
            rounds = len(items)
        except TypeError:
            items = list(items)
            rounds = len(items)
        self._left -= rounds + 1
        if self._left < 0:
            raise jinja2.exceptions.SecurityError(f"the chat template takes more than {ROUNDS_MAX} rounds")
        return items


@jinja2.pass_context
def _counted(context: Context, items: Any) -> Any:
    return context.parent[_ROUNDS].count(items)


class _TemplateNamespace(Namespace):
    """`namespace(...)` without names that lead into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set the name {name!r}")
        super().__setitem__(name, value)


class Arguments(dict[str, Any]):
    """A tool call's arguments, with the JSON text that templates most often ask for. Shared: templates cannot change it.

    Templates of DeepSeek take arguments for a text and put others before it: they get them as they were written.
    """

    def __init__(self, arguments: Mapping[str, Any], written: str = "") -> None:
        super().__init__(arguments)
        self.text = _PLAIN_JSON.encode(arguments)
        self._written = written or self.text

    def __add__(self, text: str) -> str:
        return self._written + text

    def __radd__(self, text: str) -> str:
        return text + self._written


def decoded_arguments(text: str) -> Any:
    """Return what a tool call's arguments say; the text itself if it is not JSON, which a model need not have written."""
    return _kept_arguments(text) if len(text) <= _ARGUMENTS_KEPT_CHARS_MAX else _decoded(text)


def _decoded(text: str) -> Any:
    try:
        arguments = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return Arguments(cast("dict[str, Any]", arguments), text) if isinstance(arguments, dict) else arguments


_kept_arguments = lru_cache(_ARGUMENTS_KEPT_MAX)(_decoded)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if ensure_ascii is False and indent is None and separators is None and sort_keys is False:
        if isinstance(value, Arguments):
            return value.text
        return _PLAIN_JSON.encode(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
    cast(dict[str, Any], environment.filters)["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType]
    cast(dict[str, Any], environment.filters)[_ROUNDS] = _counted  # pyright: ignore[reportUnknownMemberType]
    names = cast(dict[str, Any], environment.globals)  # pyright: ignore[reportUnknownMemberType]
    names.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_TemplateNamespace)
    return environment


class ChatTemplate:
    """One or more compiled templates of a checkpoint: the default, and by name (some have one for tools)."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compile `sources` (name to template text). Raises `TemplateFailed` on a syntax error."""
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        self._globals = dict(cast(dict[str, Any], environment.globals))  # pyright: ignore[reportUnknownMemberType]
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed(f"chat template, line {error.lineno}: {error.message}") from error
        trees = [environment.parse(source) for source in sources.values()]
        #: What it reads of what it is told; its own variables are not among them.
        self.variables = frozenset(name for tree in trees for name in meta.find_undeclared_variables(tree))
        self._has_channels = self.shows(CHANNEL)

    @cached_property
    def tells_late_systems(self) -> bool:
        """Whether it shows a message of the system's that is not the first one."""
        user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}
        system, late = {"role": "system", "content": "Hello"}, {"role": "system", "content": _CUT_HERE}
        try:
            return _CUT_HERE.strip() in self.render([system, user, answer, user, late], None)
        except TemplateFailed:
            return False

    def shows(self, text: str) -> bool:
        """Tell whether a text is written in it somewhere."""
        return any(text in source for source in self.sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        extra: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
    ) -> str:
        """Return the prompt's text.

        Args:
            messages: the conversation.
            tools: what the model may call.
            extra: further template variables.
            add_generation_prompt: open an answer.
            continue_final: end the text where the last message's content does, so that the answer goes on with it.

        Raises:
            TemplateFailed: the template refused, broke off or went beyond its bounds.
        """
        if continue_final:
            return _cut(self._render([*messages[:-1], _marked(messages)], tools, extra, False), messages[-1]["content"])
        return self._render(messages, tools, extra, add_generation_prompt)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        extra: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        variables: dict[str, Any] = {
            **self._globals,
            **self._special_tokens,
            **(extra or {}),
            "messages": one_by_one(messages) if self._has_channels else messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            _ROUNDS: _Rounds(),
        }
        template = self._choose(tools)
        try:
            # Shared, so that jinja2 does not copy what is made for this rendering alone.
            return _joined(template.root_render_func(template.new_context(variables, shared=True)))
        except _FAILURES as error:
            # What a template does to messages it did not expect: each of these is the client's to mend.
            raise TemplateFailed(f"the chat template cannot render these messages: {error}") from error

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise TemplateFailed("this model has no default chat template; use /v1/completions")
        return self._templates["default"]


#: What a template may raise: its own refusals, and what messages of a shape it did not expect lead to.
_FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


def _joined(parts: Iterator[str]) -> str:
    """Return a text made of parts. Raises `SecurityError` once it is too long."""
    pieces: list[str] = []
    chars = 0
    while some := list(islice(parts, _PARTS_JOINED)):
        pieces.append("".join(some))
        chars += len(pieces[-1])
        if chars > TEXT_CHARS_MAX:
            raise jinja2.exceptions.SecurityError(f"the text is longer than {TEXT_CHARS_MAX} characters")
    return "".join(pieces)


def _marked(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last message with the mark at its end. Raises `TemplateFailed` if there is nothing to continue."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise TemplateFailed("there is no text to continue in the last message")
    return {**messages[-1], "content": content + _CUT_HERE}


def _cut(text: str, content: str) -> str:
    """Return a rendered text up to the mark, as `transformers` cuts it: a template that trims content trims the cut too."""
    mark = _CUT_HERE.strip()
    if mark not in text or content.strip() not in text:
        raise TemplateFailed("the chat template does not show the last message as it is, so it cannot be continued")
    place = text.rindex(mark)
    return text[:place] if text.startswith(_CUT_HERE, place) else text[:place].rstrip()


def load_template(folder: Path, tokenizer_config: Fields) -> ChatTemplate:
    """Return the template of a checkpoint folder: `chat_template.jinja` before what tokenizer_config.json holds.

    Raises:
        CheckpointError: a template is malformed; the message names its file.
    """
    sources = {name: (tokenizer_config.path, source) for name, source in _written(tokenizer_config).items()}
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    sources |= {name: (path, read_text(path)) for name, path in paths.items()}
    for path, source in sources.values():
        try:
            _environment().parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(path, f"chat template, line {error.lineno}: {error.message}") from error
    return ChatTemplate({name: source for name, (_, source) in sources.items()}, special_tokens(tokenizer_config))


def _written(tokenizer_config: Fields) -> dict[str, str]:
    """Return the templates that tokenizer_config.json holds: one, or several by name."""
    if isinstance(tokenizer_config.values.get("chat_template"), list):
        return {entry.text("name"): entry.text("template") for entry in tokenizer_config.objects("chat_template")}
    if tokenizer_config.values.get("chat_template") is None:
        return {}
    return {"default": tokenizer_config.text("chat_template")}
