"""A model's chat template: messages and tools in, the prompt's text out, letter for letter as `transformers` renders it.

Templates come with checkpoints, so they run in jinja2's immutable sandbox. They are rendered whole on every turn: that is string
joining, and the part of a turn that could not be shown to depend on its new messages alone.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from orchestrator.live.text.files import Fields, ModelUnusable, read_text

#: Attributes of a dict that a template may mean by `message.items`; every other name can only be a key.
_DICT_ATTRIBUTES = frozenset(dir(dict))


_PLAIN_JSON = json.JSONEncoder(ensure_ascii=False)


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
    """The sandbox, with short ways to what templates do once per message: read a dict's keys and call their own macros."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]  # pyright: ignore[reportUnknownVariableType]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)  # pyright: ignore[reportUnknownArgumentType]
        return super().getattr(obj, attribute)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if type(__obj) is Macro:
            kwargs.pop("_block_vars", None)
            kwargs.pop("_loop_vars", None)
            return __obj(__context.eval_ctx, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


class _TemplateNamespace(Namespace):
    """`namespace(...)` without names that lead into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set the name {name!r}")
        super().__setitem__(name, value)


class Arguments(dict[str, Any]):
    """A tool call's arguments, with the JSON text that templates most often ask for. Shared: templates cannot change it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.text = _PLAIN_JSON.encode(arguments)


def decoded_arguments(text: str) -> Any:
    """Return what a tool call's arguments say; the text itself if it is not JSON, which a model need not have written."""
    return _kept_arguments(text) if len(text) <= _ARGUMENTS_KEPT_CHARS_MAX else _decoded(text)


def _decoded(text: str) -> Any:
    try:
        arguments = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return Arguments(cast("dict[str, Any]", arguments)) if isinstance(arguments, dict) else arguments


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
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailed(f"chat template, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        extra: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
    ) -> str:
        """Return the prompt's text. Raises `TemplateFailed`.

        Args:
            messages, tools: as templates read them.
            extra: further template variables.
            add_generation_prompt: end with what begins an answer.
            continue_final: end within the last message, which the answer goes on with.
        """
        variables = {**self._special_tokens, **(extra or {})}
        try:
            text = self._choose(tools).render(
                variables, messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt
            )
            return _cut_after(text, str(messages[-1]["content"])) if continue_final else text
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # What a template does to messages it did not expect: each of these is the client's to mend.
            raise TemplateFailed(f"the chat template cannot render these messages: {error}") from error

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise TemplateFailed("this model has no default chat template; use /v1/completions")
        return self._templates["default"]


def _cut_after(text: str, final: str) -> str:
    """Return a rendered prompt up to the end of the last message's content, as `transformers` cuts it."""
    place = text.rfind(final.strip())
    if place < 0:
        raise TemplateFailed("the chat template does not show the last message as it is, so nothing can go on after it")
    kept = final.lstrip()
    return text[: place + (len(kept) if text.startswith(kept, place) else len(final.strip()))]


def load_template(folder: Path, tokenizer_config: Fields) -> ChatTemplate:
    """Return the template of a checkpoint folder: `chat_template.jinja` before what tokenizer_config.json holds.

    Raises:
        ModelUnusable: a template is malformed; the message names its file.
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
            raise ModelUnusable(f"{path}: chat template, line {error.lineno}: {error.message}") from error
    return ChatTemplate({name: source for name, (_, source) in sources.items()}, special_tokens(tokenizer_config))


def _written(tokenizer_config: Fields) -> dict[str, str]:
    """Return the templates that tokenizer_config.json holds: one, or several by name."""
    if isinstance(tokenizer_config.values.get("chat_template"), list):
        return {entry.text("name"): entry.text("template") for entry in tokenizer_config.objects("chat_template")}
    if tokenizer_config.values.get("chat_template") is None:
        return {}
    return {"default": tokenizer_config.text("chat_template")}


def special_tokens(tokenizer_config: Fields) -> dict[str, str]:
    """Return the named special tokens (`bos_token` and so on), each written as text or as an added-token table."""
    names = [name for name, value in tokenizer_config.values.items() if name.endswith("_token") and isinstance(value, str | dict)]
    return {name: text for name in names if (text := tokenizer_config.token_text(name)) is not None}
