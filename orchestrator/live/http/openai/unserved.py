"""Fields of OpenAI's API, and of servers like it, that are known and not served: refused unless they ask for what happens anyway.

What nobody knows is ignored, as everywhere.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec


class Unserved(msgspec.Struct, kw_only=True):
    """The fields, as they stand in a body; read only to see that they ask for nothing."""

    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    # What vLLM, SGLang and TGI have beyond.
    regex: Any = None
    json_schema: Any = None
    ebnf: Any = None
    length_penalty: Any = None
    use_beam_search: Any = None
    prompt_embeds: Any = None
    spaces_between_special_tokens: Any = None
    chat_template: Any = None
    suffix: Any = None
    logits_processors: Any = None


#: What a field may say besides null, because it is what happens anyway.
_HARMLESS: Mapping[str, Sequence[Any]] = {
    "modalities": (["text"], []),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
}
_NAMES = Unserved.__struct_fields__
_values = attrgetter(*_NAMES)
#: The values of most requests.
_NOTHING = (None,) * len(_NAMES)


def unserved(request: Unserved) -> str | None:
    """Return the first field that asks for something that is not served, None if there is none."""
    values = _values(request)
    if values == _NOTHING:
        return None
    for name, value in zip(_NAMES, values, strict=True):
        if value is not None and value not in _HARMLESS.get(name, ()):
            return name
    return None
