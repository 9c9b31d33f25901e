"""What a client asks for, in no API's words: what dialects' parsers make of a request, and all that is known of it after.

    Asked  =  model  +  prompt (Conversation or Texts)  +  Constraint?  +  Sampling  +  Limits  +  Hints  +  Report

Whoever makes one has checked what can be checked without knowing the model; token ids are compared with its vocabulary by
`intake.py`. Nothing here knows HTTP, JSON or protobuf.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.core.making import quickly_made
from orchestrator.core.types import GatewayId, Sampling, ServiceClass

#: What a number of 32 bits holds: more tokens than any vocabulary has.
TOP_K_MAX = (1 << 31) - 1


class ConstraintKind(StrEnum):
    """In which language it is said what an answer may be."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    #: One of the texts of a JSON list.
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be, to the letter."""

    kind: ConstraintKind
    #: The schema, list, expression or grammar.
    text: str
    #: Where the client wrote it, for what is wrong with it.
    field: str


@quickly_made
@dataclass(frozen=True, slots=True)
class ToolUse:
    """What the model must do with its tools."""

    #: It calls at least one.
    forced: bool = False
    #: Only this one; empty: any.
    name: str = ""
    #: It may call several in one answer.
    parallel: bool = True
    #: What the one argument of some tools, `input`, must be to the letter: an expression or a grammar, by a tool's name.
    inputs: Mapping[str, Constraint] = field(default_factory=lambda: {})
    #: Where the client wrote it.
    field: str = "tool_choice"
    #: Where the client wrote the schema of a tool's arguments, by the tool's place.
    schema_field: str = "tools[{}].function.parameters"
    #: The same for each tool, where their places do not tell it; empty where they do.
    schema_fields: Sequence[str] = ()


class Effort(StrEnum):
    """How hard a model is to think, in the words that clients have for it."""

    NONE = "none"
    MINIMAL = "minimal"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    XHIGH = "xhigh"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Thinking:
    """How much the model is to think before it answers: what its chat template knows of that is told to it.

    Raises:
        ValueError: it is switched on, and its effort is none.
    """

    #: None: as its template has it, or as the effort says.
    enabled: bool | None = None
    #: None: as its template has it.
    effort: Effort | None = None
    #: Tokens of thoughts at most.
    budget_tokens: int | None = None
    #: Where the client wrote it.
    field: str = "reasoning_effort"
    #: Where the client wrote `budget_tokens`, if they must be kept to; empty: they are advice where they cannot be.
    budget_field: str = ""

    def __post_init__(self) -> None:
        if self.enabled and self.effort is Effort.NONE:
            raise ValueError("thinking is switched on, and its effort is none")

    @property
    def unwanted(self) -> bool:
        """It is asked not to think."""
        return self.enabled is False or self.effort is Effort.NONE

    @property
    def wanted(self) -> bool:
        """It is asked to think."""
        return not self.unwanted and (self.enabled is not None or self.effort is not None)


#: Nothing was said of calls.
AS_IT_LIKES = ToolUse()
#: Nothing was said of thoughts.
THINKS_AS_EVER = Thinking()


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A place in a conversation up to which its prompt is to be kept."""

    #: For how long.
    seconds: float
    #: The message, or the tool, that it is in; counted from 0.
    place: int
    #: Characters of the message's content before it; None: it is behind the tool.
    chars: int | None = None


@quickly_made
@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that a chat template makes a prompt of; see `text/conversations.py` for how both lists look."""

    messages: Sequence[Mapping[str, Any]]
    #: What the model is told that it may call; None for nothing.
    tools: Sequence[Mapping[str, Any]] | None = None
    #: What the template is told besides; before what follows from `thinking`.
    variables: Mapping[str, Any] = field(default_factory=lambda: {})
    #: The prompt ends with what begins an answer.
    opens_answer: bool = True
    #: The prompt ends where the last message's content does, so that the answer goes on with it.
    continues: bool = False
    #: The model's fixed tokens stand in front of what the template makes.
    prefixed: bool = False
    tool_use: ToolUse = AS_IT_LIKES
    thinking: Thinking = THINKS_AS_EVER
    #: Up to which its prompt is to be kept, in order, longest first.
    breakpoints: Sequence[Breakpoint] = ()


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts to be gone on with as they are: at least one, each a text or token ids, none empty."""

    texts: Sequence[str | Sequence[int]]
    #: The model's fixed tokens stand in front of each text; never in front of token ids.
    prefixed: bool = True


@quickly_made
@dataclass(frozen=True, slots=True)
class Limits:
    """How much is asked for, and what ends it."""

    #: Tokens to generate at most; None for as many as the context has room for; 0: none, only the prompt counts.
    output_tokens_max: int | None = None
    #: Strings that end the output; no earlier than `Sampling.output_tokens_min` lets tokens end it.
    stop_strings: Sequence[str] = ()
    #: What ends the output is part of it.
    includes_ends: bool = False
    #: The model's own ends do not end it.
    ignores_ends: bool = False
    #: Texts that the model never writes, at a word's beginning or within one.
    forbidden_words: Sequence[str] = ()
    #: A longer prompt loses what is before its last so many tokens; 0: as many as there is room for; None: it is refused.
    prompt_tokens_max: int | None = None
    #: Generations for each prompt.
    choices: int = 1


@quickly_made
@dataclass(frozen=True, slots=True)
class Hints:
    """When and where to serve it; never what is said."""

    #: Higher is served earlier; within 32 bits.
    priority: int = 0
    #: None: the tenant's.
    service_class: ServiceClass | None = None
    #: The session as the request itself names it; a transport may know better.
    session: str | None = None
    #: Keeps its cached blocks apart from others of the same tenant.
    cache_salt: str = ""
    #: Seconds for which to keep the prompt's cached blocks, within the tenant's quota; 0: as long as there is room.
    retention_s: float = 0.0
    #: The gateway that keeps what it goes on from; None: it brings all of it.
    gateway: GatewayId | None = None
    #: Of class cadence: the longest beat, in seconds, that serves it; 0: any.
    beat_s_max: float = 0.0


@quickly_made
@dataclass(frozen=True, slots=True)
class Report:
    """What to tell besides the answer, and how."""

    #: Tokens are sent as they come.
    streams: bool = False
    #: A stream ends with its usage; whole answers always have theirs.
    usage: bool = False
    #: Thoughts are told, apart from the answer.
    thoughts: bool = True
    #: Special tokens show in the text.
    special_tokens: bool = False
    #: Tokens are told beside their text: the prompt's, and the answer's as they come.
    token_ids: bool = False
    #: An answer's text begins with the prompt's, and its log probabilities, if there are any, with those of the prompt.
    echoes: bool = False
    #: The prompt's log probabilities are told apart.
    prompt_scores: bool = False
    #: Where tokens have log probabilities, they are named by their numbers.
    tokens_by_id: bool = False
    #: A stream has its usage with each event.
    usage_each: bool = False
    #: A stream's events are padded, so that their sizes do not tell what is in them.
    padded: bool = False

    @property
    def tells_tokens(self) -> bool:
        """Whether more than an answer's text is to be told of it and of its prompt."""
        return self.token_ids or self.usage_each or self.echoes or self.prompt_scores

    #: But not what they say.
    withholds_thoughts: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class Asked:
    """One request for generations."""

    #: As the client named it.
    model: str
    prompt: Conversation | Texts
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    hints: Hints = field(default_factory=Hints)
    report: Report = field(default_factory=Report)
    #: None: it may be anything.
    constraint: Constraint | None = None
    #: What the dialect that made it has to know again when it writes the answer; nobody else looks at it.
    origin: object = None

    @property
    def generations(self) -> int:
        """Generations in all: prompts times choices."""
        return self.limits.choices * (len(self.prompt.texts) if isinstance(self.prompt, Texts) else 1)
