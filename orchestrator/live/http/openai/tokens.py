"""What clients ask of tokens alone, in vLLM's words: the tokens of a text or a conversation, and the text of tokens."""

from array import array
from typing import Any

import msgspec

from orchestrator.live.asked import Asked, Texts
from orchestrator.live.http.openai.bodies import ChatRequest, Message
from orchestrator.live.http.openai.requests import check_common, conversation_of
from orchestrator.live.http.reading import decode
from orchestrator.live.refusals import require
from orchestrator.live.text.models import ModelText
from orchestrator.live.turns import Prompt


class TokeniseRequest(ChatRequest, kw_only=True):
    """Body of /tokenize: a prompt, or what a chat's prompt is made of."""

    model: str = ""
    messages: list[Message] = msgspec.field(default_factory=lambda: [])
    prompt: str | None = None
    return_token_strs: bool | None = None


class DetokeniseRequest(msgspec.Struct):
    """Body of /detokenize."""

    tokens: list[int]
    model: str = ""


_TOKENISE = msgspec.json.Decoder(TokeniseRequest, strict=True)
_DETOKENISE = msgspec.json.Decoder(DetokeniseRequest, strict=True)


def parse_tokenise(body: bytes) -> tuple[Asked, bool]:
    """Read a body of /tokenize: return what is to be encoded, and whether tokens are to be spelled too. Raises `Invalid`."""
    request = decode(_TOKENISE, body)
    check_common(request)
    spelled = bool(request.return_token_strs)
    if request.prompt is None:
        return Asked(request.model, conversation_of(request)), spelled
    require(not request.messages, "prompt", "cannot be combined with messages")
    return Asked(request.model, Texts([request.prompt], prefixed=request.add_special_tokens is not False)), spelled


def parse_detokenise(body: bytes) -> tuple[str, list[int]]:
    """Read a body of /detokenize: return the model's name, empty if there is none, and tokens. Raises `Invalid`."""
    request = decode(_DETOKENISE, body)
    return request.model, request.tokens


def token_list(prompt: Prompt, model: ModelText, spelled: bool) -> dict[str, Any]:
    """Return the answer of /tokenize."""
    tokens = array("I", prompt.tokens).tolist()
    names = [model.tokenizer.id_to_token(token) for token in tokens] if spelled else None
    return {"count": prompt.count, "max_model_len": model.context_tokens_max, "tokens": tokens, "token_strs": names}
