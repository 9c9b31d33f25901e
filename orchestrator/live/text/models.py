"""What a gateway knows of a model: the text side of a checkpoint folder. Weights are the nodes' business.

See also: `prompts.py` (text to tokens), `templates.py` (messages to text), `detokenise.py` (tokens to text).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from orchestrator.core.config import ModelConfig
from orchestrator.core.types import ThoughtsLimit
from orchestrator.live.refusals import require
from orchestrator.live.text.detokenise import Vocabulary
from orchestrator.live.text.reasoning import CHANNEL_MARKS, FINAL, THOUGHTS, ReasoningStyle, reasoning_style_of
from orchestrator.live.text.segments import Segmenter
from orchestrator.live.text.styles import ToolStyle, style_of
from orchestrator.live.text.templates import ChatTemplate, load_template
from orchestrator.profiles.decoders import local_steps
from orchestrator.profiles.fields import CheckpointError, Fields, read_fields, read_text
from orchestrator.profiles.model_config import read_config
from orchestrator.profiles.positions import context_tokens_of, limited
from orchestrator.profiles.specials import end_tokens, read_named, special_names


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
    #: Tokens that end a completion, and those that end an answer in a chat (a chat's are the tokenizer's own too).
    eos_token_ids: frozenset[int]
    chat_eos_token_ids: frozenset[int]
    #: Longest prompt plus output, tokens.
    context_tokens_max: int
    #: Names the checkpoint; block hashes start from it.
    fingerprint: str
    tool_style: ToolStyle
    reasoning_style: ReasoningStyle
    #: Each token has a text of its own, by which answers can be kept to a form.
    spells: bool = True

    @property
    def in_channels(self) -> bool:
        """Its answers are in channels, thoughts and calls among them (`channels.py`)."""
        return self.reasoning_style is ReasoningStyle.HARMONY or self.tool_style is ToolStyle.HARMONY

    def limit_of_thoughts(self, tokens_max: int, opened: bool) -> ThoughtsLimit | None:
        """Return what lets an answer think for so many tokens; None if there are no tokens that mark its thoughts.

        Args:
            tokens_max: so many.
            opened: the answer begins with thoughts.
        """
        if self.in_channels:
            _, channel, message, _, end, *_ = CHANNEL_MARKS
            *begin, end, instead = map(self.tokenizer.token_to_id, (channel, THOUGHTS, message, end, FINAL))
            known = [token for token in begin if token is not None]
            if len(known) < len(begin) or end is None or instead is None:
                return None
            return ThoughtsLimit(tokens_max, end, tuple(known), instead)
        begin, end = map(self.tokenizer.token_to_id, self.reasoning_style.marks or ("", ""))
        return ThoughtsLimit(tokens_max, end, () if opened else (begin,)) if begin is not None and end is not None else None

    def spelled(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included. Raises `Invalid` if one is none of the model's."""
        size = self.vocabulary_size
        require(all(0 <= token < size for token in tokens), "tokens", f"token ids must be from 0 to {size - 1}")
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def runs_of(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of words, of each as it stands at a text's beginning and, if those are others, after a space."""
        runs: dict[tuple[int, ...], None] = {}
        for word in words:
            bare, spaced = (
                tuple(self.tokenizer.encode(text, add_special_tokens=False).ids) for text in (word, f" {word.lstrip()}")
            )
            runs[bare] = None
            # Other tokens, or as many of which the first is another: else it begins with a space that is a token of its own.
            if bare and len(spaced) == len(bare) and spaced[0] != bare[0]:
                runs[spaced] = None
        return tuple(run for run in runs if run)

    @staticmethod
    def load(folder: Path, fingerprint: str, parsers: ModelConfig | None = None, context_tokens_max: int = 0) -> "ModelText":
        """Read a Hugging Face checkpoint folder.

        Args:
            folder: holds config.json, tokenizer.json, tokenizer_config.json.
            fingerprint: names the checkpoint, as its nodes name it.
            parsers: the model's table in the cluster file, for how its answers are read; None: as its template teaches.
            context_tokens_max: a limit below the model's own; 0 for none.

        Raises:
            CheckpointError: a file is missing or malformed.
            ConfigError: the limit is above the model's own.
        """
        config = read_config(folder)
        described = read_fields(folder / "tokenizer.json")
        named = read_named(folder)
        tokenizer = _tokenizer(described)
        template = load_template(folder, named)
        parsers = parsers or ModelConfig()
        style = style_of(parsers.tool_parser, template.sources.get("tool_use") or template.sources.get("default", ""))
        reasoning = reasoning_style_of(parsers.reasoning_parser, "".join(template.sources.values()))
        size = max(config.count("vocab_size", 1), tokenizer.get_vocab_size())
        eos = end_tokens(config, size)
        return ModelText(
            tokenizer=tokenizer,
            segmenter=Segmenter(described.values),
            template=template,
            vocabulary=Vocabulary(tokenizer, described.values, special_names(named), (*style.marks, *reasoning.marks)),
            prefix=_prefix(tokenizer),
            vocabulary_size=size,
            eos_token_ids=eos,
            chat_eos_token_ids=eos | _own_eos(named, tokenizer),
            context_tokens_max=limited(context_tokens_of(config), context_tokens_max),
            fingerprint=fingerprint,
            tool_style=style,
            reasoning_style=reasoning,
            spells=local_steps(described.values.get("decoder")) is not None,
        )


def _tokenizer(described: Fields) -> Tokenizer:
    """Return the tokenizer that a tokenizer.json describes. Raises `CheckpointError`."""
    for token in described.objects("added_tokens"):
        token.text("content")
    try:
        tokenizer = Tokenizer.from_str(read_text(described.path))
    except Exception as error:  # The library has no narrower class for a file it cannot use.
        raise CheckpointError(described.path, str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Its memory of words is everybody's: a prompt would take less time if its rare words came in somebody else's. Prompts kept by
    # tenant (`prompts.py`) make up for it. Not all kinds have such a memory, and the library names it for its own use.
    forget = getattr(tokenizer.model, "_resize_cache", None)
    if forget is not None:
        forget(0)
    return tokenizer


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text; what it would put after is left out, since the model continues there."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.encode("a").ids
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return tuple(dressed[:start])
    return ()


def _own_eos(named: Fields, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the token that the tokenizer itself ends a turn with, which checkpoints of chats often name nowhere else."""
    content = named.token_text("eos_token")
    token = tokenizer.token_to_id(content) if content is not None else None
    return frozenset() if token is None else frozenset({token})
