"""What every way in does with a request before it becomes turns: whose it is, which model, which tokens and blocks.

    key -> tenant        name -> model        session's name -> session
    Asked -> text (`text/templates.py`) -> tokens and block hashes (`text/prompts.py`) -> Prepared

Knows neither HTTP nor gRPC: what cannot be served raises `Refused`, and each way in says that in its own words.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from hmac import compare_digest
from types import MappingProxyType
from typing import Any, assert_never

from orchestrator.core.blocks import TOKEN_BYTES, hash_root
from orchestrator.core.config import ClusterConfig, Named
from orchestrator.core.making import quickly_made
from orchestrator.core.types import (
    DEFAULT_TENANT,
    AdapterName,
    BlockHash,
    ModelName,
    Sampling,
    ServiceClass,
    SessionId,
    TenantId,
    ThoughtsLimit,
)
from orchestrator.live.asked import Asked, Breakpoint, Conversation, Limits, Texts, Thinking
from orchestrator.live.binding import bound
from orchestrator.live.chains import Chain, Chains
from orchestrator.live.refusals import Invalid, KeyUnknown, ModelUnknown, require
from orchestrator.live.text.channels import ChannelParser
from orchestrator.live.text.checks import Checks
from orchestrator.live.text.conversations import tool_parameters, without_late_systems
from orchestrator.live.text.generation import AnswerParser
from orchestrator.live.text.grammars import Unkeepable
from orchestrator.live.text.models import ModelText
from orchestrator.live.text.places import places
from orchestrator.live.text.prompts import PromptTokeniser
from orchestrator.live.text.reasoning import ReasoningStyle, ThinkParser
from orchestrator.live.text.styles import call_id, make_parser
from orchestrator.live.text.templates import TemplateFailed
from orchestrator.live.text.thinking import thinking_variables
from orchestrator.live.text.tools import ToolParser
from orchestrator.live.turns import Prompt

#: Longer session names are hashed down to this many characters.
_SESSION_CHARS_MAX = 256
#: Log probabilities of one prompt: a hundred megabytes of JSON.
PROMPT_SCORES_MAX = 1 << 20

NO_ADAPTERS: Mapping[str, str] = MappingProxyType({})
ParserMaker = Callable[[], AnswerParser | None]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that clients may ask for."""

    #: The model whose pools compute it.
    name: ModelName
    #: The LoRA adapter that it is changed by; None: none.
    adapter: AdapterName | None
    #: What it is called, whichever alias was asked for.
    label: ModelName
    #: Names the weights, adapter included; block hashes start from it.
    fingerprint: str
    text: ModelText
    #: Each tenant's own, so that nobody's prompts push out another's.
    prompts: Mapping[TenantId, PromptTokeniser]


@dataclass(frozen=True, slots=True)
class Keep:
    """A prompt's beginning that is to be kept."""

    #: Its blocks: at least one.
    hashes: tuple[BlockHash, ...] = field(repr=False)
    #: Tokens in all of them.
    tokens: int
    seconds: float


@quickly_made
@dataclass(frozen=True, slots=True)
class Prepared:
    """A request of which nothing is left to check: what its turns are made of."""

    asked: Asked
    model: ServedModel
    tenant: TenantId
    session: SessionId | None
    #: Each shorter than the model's context.
    prompts: Sequence[Prompt]
    #: As asked, with the model's own ends among the stop tokens unless they are to be ignored.
    sampling: Sampling
    #: Returns a fresh parser for each answer; None for answers that hold neither thoughts nor tool calls.
    parser: ParserMaker
    #: As asked, or else the tenant's.
    service_class: ServiceClass
    #: What of the prompts is to be kept, longest first.
    keeps: Sequence[Keep] = ()


class Intake:
    """One gateway's. Belongs to one event loop.

    Args:
        config: the cluster's.
        texts: the text side of every model in `config`.
        secret: keys block hashes; the same in all gateways.
        adapters: the fingerprints of all adapters in `config`.
    """

    def __init__(
        self,
        config: ClusterConfig,
        texts: Mapping[ModelName, ModelText],
        secret: bytes,
        adapters: Mapping[str, str] = NO_ADAPTERS,
    ) -> None:
        self._config = config
        self._secret = secret
        self._tenants = {_digest(key.encode()): TenantId(one.name) for one in config.tenants for key in one.keys}
        tenants = tuple(TenantId(one.name) for one in config.tenants) or (DEFAULT_TENANT,)
        gateway = config.gateway
        self._checks = Checks()
        #: Roots without salt, by fingerprint and tenant.
        self._roots: dict[tuple[str, TenantId], BlockHash] = {}
        #: What prompts were made of lately.
        self.chains = Chains(tenants, config.limits.sessions_max, gateway.chain_blocks_max)
        self._block_tokens = {name: config.pools_of(name)[0].engine.block_tokens for name in texts}
        self.models = {
            name: ServedModel(name, None, name, text.fingerprint, text, _prompts(config, name, text, tenants))
            for name, text in texts.items()
        }
        #: By every name that clients may use as it is.
        self._served = {name: self._serving(named, adapters) for name, named in config.names().items()}

    # --- names --------------------------------------------------------------------------------------------------------

    def tenant_of(self, key: bytes) -> TenantId:
        """Return the tenant a key stands for; where no keys are asked for any key does. Raises `KeyUnknown`."""
        if not self._config.tenants:
            return DEFAULT_TENANT
        tenant = self._tenants.get(_digest(key))
        if tenant is None:
            raise KeyUnknown
        return tenant

    def check_metrics_key(self, key: bytes) -> None:
        """See that whoever has a key may see metrics. Raises `KeyUnknown`."""
        wanted = self._config.gateway.metrics_key
        if not wanted:
            self.tenant_of(key)
        elif not compare_digest(key, wanted.encode()):
            raise KeyUnknown("the key for metrics is missing or wrong")

    def model_named(self, name: str) -> ServedModel:
        """Return the model of that name, or else of the longest alias that matches. Raises `ModelUnknown`."""
        if (served := self._served.get(name)) is not None:
            return served
        named = self._config.named(name)
        if named is None:
            raise ModelUnknown(name)
        return self._served[named.label]

    def model_or_only(self, name: str) -> ServedModel:
        """Return the model of that name; without a name the one that is served, if there is no other. Raises `Refused`."""
        require(bool(name) or len(self.models) == 1, "model", "must be named: several are served")
        return self.model_named(name or next(iter(self.models)))

    def model_names(self) -> list[str]:
        """Return the names clients may ask for; aliases that match by their beginning are left out."""
        return list(self._served)

    def _serving(self, named: Named, adapters: Mapping[str, str]) -> ServedModel:
        model = self.models[named.model]
        if named.adapter is None:
            return model
        return replace(model, adapter=named.adapter, label=named.label, fingerprint=adapters[named.adapter])

    def session_named(self, name: str | None) -> SessionId | None:
        """Return the session that clients call so; None for none, or for an empty name."""
        if not name:
            return None
        return SessionId(name if len(name) <= _SESSION_CHARS_MAX else _digest(name.encode()).hex())

    # --- prompts ------------------------------------------------------------------------------------------------------

    async def prepare(self, asked: Asked, model: ServedModel, tenant: TenantId, session: SessionId | None) -> Prepared:
        """Return a request's prompts as tokens and block hashes, and how its tokens are chosen and read. Raises `Invalid`."""
        self._check_generations(asked)
        salt = asked.hints.cache_salt
        keeps: Sequence[Keep] = ()
        match asked.prompt:
            case Conversation() as written:
                conversation = _told(written, model)
                text = _rendered(conversation, model, asked.report.thoughts)
                prompts = [await self.encode(model, text, tenant, session, salt, conversation.prefixed)]
                keeps = self._keeps(conversation, model, tenant, text, prompts[0])
                opened = _opened(conversation, text, model.text.reasoning_style)
                parser, ends = _parser_maker(asked, conversation, opened, model.text), model.text.chat_eos_token_ids
                grammar = await self._checked(asked, model.text, text, opened)
                thoughts = _thoughts_limit(conversation.thinking, opened, model.text)
            case Texts(texts, prefixed):
                prompts = [await self.encode(model, text, tenant, session, salt, prefixed) for text in texts]
                parser, ends = _no_parser, model.text.eos_token_ids
                grammar, thoughts = await self._checked(asked, model.text), None
            case _:
                assert_never(asked.prompt)
        if asked.limits.prompt_tokens_max is not None:
            prompts = [self._shortened(prompt, asked.limits, model, tenant) for prompt in prompts]
        for prompt in prompts:
            _check_length(model.text, prompt)
            _check_scores(prompt, asked.sampling)
        if session is not None:
            self.chains.remember(tenant, Chain(model.name, session, prompts[-1].hashes))
        _check_tokens(model.text, asked.sampling)
        sampling = asked.sampling if asked.limits.ignores_ends else asked.sampling.ending_with(ends)
        if grammar:
            sampling = replace(sampling, grammar=grammar)
        if thoughts is not None:
            sampling = replace(sampling, thoughts=thoughts)
        if asked.limits.forbidden_words:
            sampling = replace(sampling, forbidden_runs=model.text.runs_of(asked.limits.forbidden_words))
        sampling = sampling if model.adapter is None else replace(sampling, adapter=model.adapter)
        service_class = asked.hints.service_class or self._config.class_for(tenant)
        if asked.hints.retention_s:  # a session's last prompt goes on from those before
            kept = prompts[-1:] if session is not None else prompts
            keeps = [self._keep(model, one, len(one.hashes), asked.hints.retention_s) for one in kept if one.hashes]
        return Prepared(asked, model, tenant, session, prompts, sampling, parser, service_class, keeps)

    async def count(self, asked: Asked, model: ServedModel, tenant: TenantId) -> int:
        """Return how many tokens a request's prompts have, however long they are. Raises `Invalid`."""
        self._check_generations(asked)
        prompt, salt = asked.prompt, asked.hints.cache_salt
        texts = (
            [_rendered(_told(prompt, model), model, asked.report.thoughts)] if isinstance(prompt, Conversation) else prompt.texts
        )
        return sum([(await self.encode(model, text, tenant, None, salt, prompt.prefixed)).count for text in texts])

    def _keeps(
        self, conversation: Conversation, model: ServedModel, tenant: TenantId, text: str, prompt: Prompt
    ) -> Sequence[Keep]:
        """Return the beginnings that a conversation's breakpoints mean: for each time the longest one."""
        if not conversation.breakpoints:
            return ()
        sought = list({one.seconds: one for one in conversation.breakpoints}.values())
        last = len(conversation.messages) - 1
        inner = [one for one in sought if not _ends(conversation, one, last)]
        ends = dict(
            zip(inner, places(model.text.template, text, conversation, _variables(conversation, model), inner), strict=True)
        )
        keeps: list[Keep] = []
        for one in sought:
            blocks = len(prompt.hashes)
            if one in ends:
                tokens = model.prompts[tenant].tokens_before(text, ends[one], prompt.hash_root)
                blocks = tokens // self._block_tokens[model.name]
            if blocks:
                keeps.append(self._keep(model, prompt, blocks, one.seconds))
        return keeps

    def _keep(self, model: ServedModel, prompt: Prompt, blocks: int, seconds: float) -> Keep:
        return Keep(prompt.hashes[:blocks], blocks * self._block_tokens[model.name], seconds)

    async def beginning(self, asked: Asked, model: ServedModel, tenant: TenantId) -> Prompt:
        """Return the prompt that other requests may go on from: a conversation without the opening of an answer, or one text.

        Raises `Invalid`.
        """
        prompt = asked.prompt
        if isinstance(prompt, Conversation):
            asked = replace(asked, prompt=replace(prompt, opens_answer=False, continues=False))
        return await self.encoded(asked, model, tenant)

    async def encoded(self, asked: Asked, model: ServedModel, tenant: TenantId) -> Prompt:
        """Return a request's prompt, its first if it has several, however long it is. Raises `Invalid`."""
        salt = asked.hints.cache_salt
        match asked.prompt:
            case Conversation() as conversation:
                text = _rendered(_told(conversation, model), model, asked.report.thoughts)
                return await self.encode(model, text, tenant, None, salt, conversation.prefixed)
            case Texts(texts, prefixed):
                return await self.encode(model, texts[0], tenant, None, salt, prefixed)
            case _:
                assert_never(asked.prompt)

    async def encode(
        self,
        model: ServedModel,
        text: str | Sequence[int],
        tenant: TenantId,
        session: SessionId | None = None,
        salt: str = "",
        prefixed: bool = False,
    ) -> Prompt:
        """Return a prompt's tokens and block hashes.

        Args:
            model: whose tokens.
            text: a text, or tokens already.
            tenant: whose prompt; tenants share no block.
            session: finds the turn before.
            salt: keeps the prompt's blocks apart from others of the same tenant.
            prefixed: put the model's fixed tokens in front of a text.

        Raises:
            Invalid: a token is none of the model's.
        """
        prompts = model.prompts[tenant]
        root = self._root(model, tenant, salt)
        if isinstance(text, str):
            return await prompts.encode_aside(text, root, (session,) if session is not None else None, prefixed)
        size = model.text.vocabulary_size
        require(min(text) >= 0 and max(text) < size, "prompt", f"token ids must be from 0 to {size - 1}")
        return prompts.adopt(array("I", text).tobytes(), root)

    async def _checked(self, asked: Asked, model: ModelText, prompt: str = "", opened: bool = False) -> str:
        """Return the grammar that an answer is kept to, as engines read it; empty for none. Raises `Invalid`.

        Args:
            asked: the whole request.
            model: whose answer.
            prompt: a conversation's; empty for a text.
            opened: the answer begins with thoughts.
        """
        try:
            grammar = bound(asked, model, prompt, opened)
            return await self._checks.check(grammar) if grammar is not None else ""
        except Unkeepable as error:
            raise Invalid(str(error), "invalid_value", error.field) from error

    def _shortened(self, prompt: Prompt, limits: Limits, model: ServedModel, tenant: TenantId) -> Prompt:
        """Return a prompt, or what may stay of it at its end."""
        room = model.text.context_tokens_max - (limits.output_tokens_max or 1)
        kept = max(1, limits.prompt_tokens_max or room)
        return (
            prompt
            if prompt.count <= kept
            else model.prompts[tenant].adopt(prompt.tokens[-kept * TOKEN_BYTES :], prompt.hash_root)
        )

    def _root(self, model: ServedModel, tenant: TenantId, salt: str) -> BlockHash:
        if salt:
            return hash_root(self._secret, model.fingerprint, f"{tenant}\0{salt}")
        root = self._roots.get((model.fingerprint, tenant))
        if root is None:
            root = self._roots[model.fingerprint, tenant] = hash_root(self._secret, model.fingerprint, f"{tenant}\0")
        return root

    def _check_generations(self, asked: Asked) -> None:
        """Refuse a request that is too many in one, before any of them begins."""
        most = self._config.gateway.generations_max
        if asked.generations > most:
            problem = f"a request may have {most} generations (prompts times n), this one has {asked.generations}"
            raise Invalid(problem, "too_many_generations", "n")


def _ends(conversation: Conversation, one: Breakpoint, last: int) -> bool:
    """Return whether a breakpoint is where its conversation ends."""
    return one.place == last and one.chars == len(str(conversation.messages[last].get("content", "")))


def _told(conversation: Conversation, model: ServedModel) -> Conversation:
    """Return a conversation as a model's template can tell it."""
    late = any(message["role"] == "system" for message in conversation.messages[1:])
    return without_late_systems(conversation) if late and not model.text.template.tells_late_systems else conversation


def _variables(conversation: Conversation, model: ServedModel) -> dict[str, Any]:
    """Return what a model's template is told besides messages and tools."""
    return {**thinking_variables(conversation.thinking, model.text.template), **conversation.variables}


def _rendered(conversation: Conversation, model: ServedModel, thoughts_told: bool) -> str:
    """Return a conversation as text. Raises `Invalid`, also where thoughts would be told that are not wanted."""
    one, variables, style = conversation, _variables(conversation, model), model.text.reasoning_style
    try:
        text = model.text.template.render(one.messages, one.tools, variables, one.opens_answer, one.continues)
    except TemplateFailed as error:
        raise Invalid(str(error), "invalid_messages", "messages") from error
    refused = thoughts_told and one.thinking.unwanted and one.opens_answer and style.opened_by(text)
    require(not refused, one.thinking.field, "this model's chat template begins thoughts all the same: it has no switch for them")
    return text


def _parser_maker(asked: Asked, conversation: Conversation, opened: bool, model: ModelText) -> ParserMaker:
    """Return what makes parsers for answers to a conversation; `opened`: they begin with thoughts."""
    style, tools = model.reasoning_style, conversation.tools
    parameters = tool_parameters(tools)

    def make_calls() -> ToolParser | None:
        return make_parser(model.tool_style, parameters, conversation.tool_use.parallel) if tools else None

    def make() -> AnswerParser | None:
        if model.in_channels:
            offered = parameters if tools else None
            return ChannelParser(offered, call_id, asked.report.thoughts, conversation.tool_use.parallel, conversation.continues)
        if style is ReasoningStyle.NONE:
            return make_calls()
        openings = model.tool_style.openings if tools else ()
        return ThinkParser(opened, make_calls(), asked.report.thoughts, openings, make_calls)

    return make


def _opened(conversation: Conversation, text: str, style: ReasoningStyle) -> bool:
    """Tell whether an answer begins with thoughts."""
    continued = str(conversation.messages[-1]["content"]) if conversation.continues else None
    return style.opened_by(text, continued)


def _thoughts_limit(thinking: Thinking, opened: bool, model: ModelText) -> ThoughtsLimit | None:
    """Return how long an answer may think. Raises `Invalid` if that must be kept and the model has no token for its end."""
    if thinking.budget_tokens is None:
        return None
    limit = model.limit_of_thoughts(thinking.budget_tokens, opened)
    problem = "this model's thoughts are not between tokens of their own, so that they cannot be limited"
    require(limit is not None or not thinking.budget_field, thinking.budget_field, problem)
    return limit


def _no_parser() -> None:
    """Return the parser of answers that are text whatever is in them."""
    return


def _check_length(model: ModelText, prompt: Prompt) -> None:
    most = model.context_tokens_max
    if prompt.count >= most:
        # In the words that clients of either kind look for.
        long = f"the prompt is too long: {prompt.count} tokens > {most - 1} maximum"
        problem = f"this model's maximum context length is {most} tokens, and {long}"
        raise Invalid(problem, "context_length_exceeded", "messages")
    if prompt.count == 0:
        raise Invalid("the prompt is empty", "invalid_value", "messages")


def _check_scores(prompt: Prompt, sampling: Sampling) -> None:
    """Refuse more log probabilities of a prompt than one request may have."""
    if sampling.prompt_logprobs is not None:
        count = prompt.count * (1 + sampling.prompt_logprobs)
        problem = f"a prompt of {prompt.count} tokens would have {count} log probabilities, it may have {PROMPT_SCORES_MAX}"
        require(count <= PROMPT_SCORES_MAX, "prompt_logprobs", problem)


def _check_tokens(model: ModelText, sampling: Sampling) -> None:
    """Refuse tokens that are none of the model's."""
    size = model.vocabulary_size
    for token in sampling.stop_token_ids:
        require(0 <= token < size, "stop_token_ids", f"{token} is no token id (0 to {size - 1})")
    for token in sampling.allowed_token_ids:
        require(0 <= token < size, "allowed_token_ids", f"{token} is no token id (0 to {size - 1})")
    for token in sampling.logit_bias:
        require(0 <= token < size, "logit_bias", f"'{token}' is no token id (0 to {size - 1})")


def _prompts(
    config: ClusterConfig, name: ModelName, text: ModelText, tenants: Sequence[TenantId]
) -> dict[TenantId, PromptTokeniser]:
    """Return a tokeniser for each tenant, all with the same share of the memory for prompts."""
    sharing = len(config.models) * len(tenants)
    block_tokens = config.pools_of(name)[0].engine.block_tokens
    prompts_max = max(1, config.gateway.prompts_cached_max // sharing)
    chars_max = config.gateway.prompt_chars_cached_max // sharing
    return {
        tenant: PromptTokeniser(text.tokenizer, text.segmenter, text.prefix, block_tokens, prompts_max, chars_max)
        for tenant in tenants
    }


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()
