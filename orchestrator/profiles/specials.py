"""Which of a checkpoint's tokens are no text: marks, ends and their like, whichever of its files names them.

Gateways hide them in answers; engines keep them out of what a grammar takes for text.
"""

from pathlib import Path
from typing import Any, cast

from orchestrator.profiles.fields import Fields, read_fields


def read_named(folder: Path) -> Fields:
    """Return tokenizer_config.json, with what only the older special_tokens_map.json says."""
    older = read_fields(folder / "special_tokens_map.json", needed=False)
    newer = read_fields(folder / "tokenizer_config.json", needed=False)
    return Fields(newer.path, {**older.values, **newer.values})


def special_names(named: Fields) -> frozenset[str]:
    """Return the tokens that tokenizer_config.json calls special; `transformers` hides them whatever tokenizer.json says."""
    added = named.object("added_tokens_decoder")
    names = [token.text("content") for token in map(added.object, added.values) if token.values.get("special")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        found = named.values.get(name)
        listed = {str(place): one for place, one in enumerate(cast("list[Any]", found))} if isinstance(found, list) else None
        more = Fields(named.path, listed) if listed is not None else named.object(name)
        names += [text for one in more.values if (text := more.token_text(one)) is not None]
    return frozenset((*names, *special_tokens(named).values()))


def special_tokens(tokenizer_config: Fields) -> dict[str, str]:
    """Return the named special tokens (`bos_token` and so on), each written as text or as an added-token table."""
    names = [name for name, value in tokenizer_config.values.items() if name.endswith("_token") and isinstance(value, str | dict)]
    return {name: text for name in names if (text := tokenizer_config.token_text(name)) is not None}


def end_tokens(config: Fields, vocabulary: int) -> frozenset[int]:
    """Return the tokens that end an output: generation_config.json's, config.json's if that names none, as `transformers` has it.

    Raises `CheckpointError` for a token that is none of `vocabulary`.
    """
    generation = read_fields(config.path.with_name("generation_config.json"), needed=False)
    return generation.token_ids("eos_token_id", vocabulary) or config.token_ids("eos_token_id", vocabulary)
