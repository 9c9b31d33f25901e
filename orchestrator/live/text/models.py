"""What a gateway knows of a model: the text side of a checkpoint folder. Weights are the nodes' business.

See also: `prompts.py` (text to tokens), `templates.py` (messages to text), `text.py` (tokens to text).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from orchestrator.core.config import ModelConfig
from orchestrator.core.cost.shapes import context_tokens_of
from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.reasoning import ReasoningStyle, reasoning_style_of
from orchestrator.live.text.segments import Segmenter
from orchestrator.live.text.templates import ChatTemplate, load_template, special_tokens
from orchestrator.live.text.tools import ToolStyle, style_of

#: Context length of a checkpoint that does not name one, tokens.
_CONTEXT_TOKENS_DEFAULT = 2048


class ModelUnusable(ValueError):
    """A checkpoint folder lacks something or holds something wrong; the message names the file."""


@dataclass(frozen=True, slots=True)
class ModelText:
    """The text side of one checkpoint."""

    tokenizer: Tokenizer
    segmenter: Segmenter
    template: ChatTemplate
    vocabulary: Vocabulary
    #: Tokens in front of a plain prompt, such as the beginning-of-sequence token.
    prefix: tuple[int, ...]
    #: Token ids are below this: the model's, which may be more than the tokenizer has texts for.
    vocabulary_size: int
    #: Tokens that end a completion, and those that end an answer in a chat (see `_eos`).
    eos_token_ids: frozenset[int]
    chat_eos_token_ids: frozenset[int]
    #: Longest prompt plus output, tokens.
    context_tokens_max: int
    #: Names the checkpoint; block hashes start from it.
    fingerprint: str
    tool_style: ToolStyle
    reasoning_style: ReasoningStyle

    @staticmethod
    def load(folder: Path, fingerprint: str, parsers: ModelConfig | None = None, context_tokens_max: int = 0) -> "ModelText":
        """Read a Hugging Face checkpoint folder.

        Args:
            folder: holds config.json, tokenizer.json, tokenizer_config.json.
            fingerprint: names the checkpoint, as its nodes name it.
            parsers: the model's table in the cluster file, for how its answers are read; None: as its template teaches.
            context_tokens_max: a limit below the model's own; 0 for none.

        Raises:
            ModelUnusable: a file is missing or malformed.
        """
        config = _read(folder / "config.json")
        described = _read(folder / "tokenizer.json")
        named = {
            **_read(folder / "special_tokens_map.json", needed=False),
            **_read(folder / "tokenizer_config.json", needed=False),
        }
        generation = _read(folder / "generation_config.json", needed=False)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        template = load_template(folder, named)
        parsers = parsers or ModelConfig()
        style = style_of(parsers.tool_parser, template.sources.get("tool_use") or template.sources.get("default", ""))
        reasoning = reasoning_style_of(parsers.reasoning_parser, template.sources.get("default", ""))
        own = context_tokens_of(int(config.get("max_position_embeddings") or _CONTEXT_TOKENS_DEFAULT), config)
        size = max(int(config.get("vocab_size") or 0), tokenizer.get_vocab_size())
        eos = _eos(folder, generation, config, size)
        return ModelText(
            tokenizer=tokenizer,
            segmenter=Segmenter(described),
            template=template,
            vocabulary=Vocabulary(tokenizer, described, _special(named), (*style.marks, *reasoning.marks)),
            prefix=_prefix(tokenizer),
            vocabulary_size=size,
            eos_token_ids=eos,
            chat_eos_token_ids=eos | _own_eos(named, tokenizer),
            context_tokens_max=min(own, context_tokens_max) if context_tokens_max else own,
            fingerprint=fingerprint,
            tool_style=style,
            reasoning_style=reasoning,
        )


def _read(path: Path, needed: bool = True) -> dict[str, Any]:
    if not needed and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelUnusable(f"{path}: must hold an object, holds {type(value).__name__}")
    return cast(dict[str, Any], value)


def _special(named: Mapping[str, Any]) -> frozenset[str]:
    """Return the tokens that tokenizer_config.json calls special; `transformers` hides them whatever tokenizer.json says."""
    decoder = cast("Mapping[str, Mapping[str, Any]]", named.get("added_tokens_decoder") or {})
    added = [token.get("content") for token in decoder.values() if token.get("special")]
    lists = [cast("list[Any]", named.get(name) or []) for name in ("additional_special_tokens", "extra_special_tokens")]
    more = [one.get("content") if isinstance(one, dict) else one for one in (*lists[0], *lists[1])]
    return frozenset(name for name in (*special_tokens(named).values(), *added, *more) if isinstance(name, str))


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text; what it would put after is left out, since the model continues there."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.encode("a").ids
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return tuple(dressed[:start])
    return ()


def _eos(folder: Path, generation: Mapping[str, Any], config: Mapping[str, Any], size: int) -> frozenset[int]:
    """Return what ends any text: generation_config.json's ends, config.json's if that names none, as `transformers` has it."""
    for name, fields in (("generation_config.json", generation), ("config.json", config)):
        written = fields.get("eos_token_id")
        ids = cast(list[Any], written) if isinstance(written, list) else [] if written is None else [written]
        if not all(isinstance(one, int) and 0 <= one < size for one in ids):
            raise ModelUnusable(f"{folder / name}: eos_token_id: must be token ids from 0 to {size - 1}, is {written!r}")
        if ids:
            return frozenset(ids)
    return frozenset()


def _own_eos(named: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """Return the token that the tokenizer itself ends a turn with, which checkpoints of chats often name nowhere else."""
    written = named.get("eos_token")
    content = cast(Mapping[str, Any], written).get("content") if isinstance(written, dict) else written
    token = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return frozenset() if token is None else frozenset({token})
