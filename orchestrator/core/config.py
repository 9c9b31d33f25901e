"""Every knob of a cluster: its unit, its default, its limits. Checked when it is built; a wrong value never starts anything.

A cluster file (TOML) has the tables below; `ClusterConfig.from_mapping` turns a parsed file into one frozen object or raises
`ConfigError` naming the field. Reading the file itself is the command line's business.

    [cluster]  [gateway]  [[tenants]]  [limits]  [leases]  [router]  [store]  [models.NAME]  [models.NAME.adapters.NAME]
    [[pools]]  [pools.engine]  [pools.engine.speculation]  [pools.scheduler]  [pools.profile]  [pools.hardware]  [pools.split]
    [pools.beat]  [pools.drafter]  [log]  [trace]
"""

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import StrEnum
from itertools import pairwise
from math import isfinite
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from orchestrator.core.types import (
    ATTEMPTS_MAX,
    SHARE_MAX,
    SHARE_MIN,
    AdapterName,
    CostProfile,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    ServiceClass,
    TenantId,
    Tier,
)

#: More nodes than any pool has, and more KV blocks than any node: beyond them a number is a mistake, and takes all of a memory.
NODES_MAX = 1 << 14
#: Ranks of either half of a group.
RANKS_MAX = 256
#: Micro-batches of a step: the longer half is always busy with two or three (MegaScale-Infer, arXiv 2504.02263, section 4.1).
MICROBATCHES_MAX = 4
#: Linux's highest real-time priority; and seconds that an engine may look at the clock before each beat.
REALTIME_MAX, SPIN_S_MAX = 99, 0.01
BLOCKS_MAX = 1 << 27
GATEWAYS_MAX = 1 << 10
#: What operators call the gateways where they may name a pool as well.
GATEWAYS = "gateways"
#: And the stores, one on each host that has nodes.
STORES = "stores"
#: What a whole number in a file may be, and how much of a wrong value is shown.
WHOLE_MAX = 1 << 53
SHOWN_MAX = 60
#: Characters of a tenant's name: it goes with every assignment.
TENANT_CHARS_MAX = 64
#: Tokens that one step may verify for one sequence: a longer draft is not accepted as a whole often enough to be worth its rows.
DRAFT_TOKENS_MAX = 64
#: Tokens that a draft model sees at least: fewer than twice the longest draft leave it nothing to go by.
DRAFT_CONTEXT_TOKENS_MIN = 2 * DRAFT_TOKENS_MAX
#: And unless told.
DRAFT_CONTEXT_TOKENS = 512
#: LoRA adapters of one model, all of which are in a node's memory, and the greatest rank that any may have.
ADAPTERS_MAX, ADAPTER_RANK_MAX = 256, 512
#: Longest that a lease may be let last: 30 days.
LEASE_S_MAX = 30 * 86_400.0
#: Highest priority that a request can have: what 32 bits hold.
PRIORITY_MAX = (1 << 31) - 1
#: Tables that were, and what to write instead.
_FORMER = {
    "gateway.api_keys": 'is no more; write a table [[tenants]] with name = "TENANT" and keys = ["KEY", ...] for each tenant'
}


class ConfigError(ValueError):
    """A cluster file says something that cannot be; `where` is the dotted field."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, str]]:
        """Return what it is made of, for processes that are told of it."""
        return type(self), (self.where, self.problem)


def require(holds: bool, where: str, problem: str) -> None:
    """Raise `ConfigError` unless `holds`."""
    if not holds:
        raise ConfigError(where, problem)


def shown(value: object) -> str:
    """Return a value that is refused as text, shortened; also one that has too many digits or levels to be written out."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"too long to be shown ({type(value).__name__})"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."


class LogFormat(StrEnum):
    """How a line of a log looks."""

    HUMAN = "human"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """[log]: what processes write down of their doings."""

    #: Least level written: debug (every request), info, warning, error.
    level: str = "info"
    #: human or json.
    format: LogFormat = LogFormat.HUMAN
    #: Folder, on each host, in which each process has its file. Empty: standard error, which Ray keeps with its own logs.
    folder: str = ""

    def __post_init__(self) -> None:
        known = ("debug", "info", "warning", "error")
        require(self.level in known, "level", f"must be one of {', '.join(known)}, is {self.level!r}")


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """[trace]: spans of requests for OpenTelemetry, exported by gateways; needs `weft[otel]` on their hosts."""

    #: Base URL of a collector that takes OTLP over HTTP, such as http://collector:4318; /v1/traces is added. Empty: no traces.
    endpoint: str = ""
    #: Share of requests that are traced, 0 to 1. Does not count for those that come with a `traceparent`: its flag decides.
    sampled_share: float = 1.0
    #: The service that spans are said to come from (`service.name`).
    service: str = "weft"
    #: Spans that wait to be exported; further ones are lost.
    spans_max: int = 8192

    def __post_init__(self) -> None:
        scheme, separator, rest = self.endpoint.partition("://")
        right = not self.endpoint or (scheme in ("http", "https") and bool(separator) and bool(rest.strip("/")))
        require(right, "endpoint", f"must be a URL (http://HOST:PORT), is {shown(self.endpoint)}")
        added = not self.endpoint.rstrip("/").endswith("/v1/traces")
        require(added, "endpoint", f"must be a base URL, to which /v1/traces is added, is {shown(self.endpoint)}")
        require(0 <= self.sampled_share <= 1, "sampled_share", f"must be a share, 0 to 1, is {self.sampled_share}")
        require(bool(self.service), "service", "must not be empty")
        require(self.spans_max >= 1, "spans_max", f"must be 1 or more, is {self.spans_max}")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """[cluster.tls]: PEM files, on each host, for mutual TLS between the cluster's processes. Empty: channels are plain."""

    #: Certificate of the authority that signed every process's certificate.
    ca: str = ""
    #: This host's certificate, and its key.
    cert: str = ""
    key: str = ""
    #: The name that all certificates bear. Empty: each bears its host's address.
    name: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("ca", "cert", "key") if getattr(self, name)]
        require(len(given) in (0, 3), "ca", f"ca, cert and key must be given together, only {', '.join(given)} is")


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """[cluster]: what all parts share."""

    #: Shown by `weft status`; also names the cluster on a shared Ray.
    name: str = "weft"
    #: Keys block hashes, so that nobody outside can forge one; or where it is, on each host: env:NAME or file:PATH. Empty: a
    #: random one at each start, or, with `store.cmx`, one that is drawn once and kept there.
    secret: str = ""
    #: Seconds a node may be unreachable before all it did is given up, and a gateway before nodes end its requests.
    node_lost_s: float = 3.0
    #: Seconds a process may not answer the controller before it is killed and started anew. More than `node_lost_s`: going round
    #: a node costs little, killing one that was only slow costs all it holds.
    hung_s: float = 5.0
    #: Seconds running requests get to finish on a drain, restart, resize or SIGTERM.
    drain_s: float = 30.0
    #: Folder, on each host, in which every gateway and node writes down its events and decisions. Empty: they do not.
    journal: str = ""
    #: File, on each gateway's host, that gets what it serves as a trace; gateway 1 writes FILE.1, and so on. Empty: none.
    record: str = ""
    tls: TlsConfig = field(default_factory=TlsConfig)

    def __post_init__(self) -> None:
        require(bool(self.name), "name", "must not be empty")
        require(self.node_lost_s > 0, "node_lost_s", f"must be over 0 seconds, is {self.node_lost_s}")
        require(self.hung_s > 0, "hung_s", f"must be over 0 seconds, is {self.hung_s}")
        require(self.drain_s >= 0, "drain_s", f"must be 0 or more seconds, is {self.drain_s}")


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """[[tenants]]: who may ask, with which keys, for how much, and what is theirs of a full cluster.

    Limits hold over all gateways together: each gateway has an equal part of them.
    """

    #: Shown in metrics and journals; blocks are never shared between tenants.
    name: str
    #: Bearer tokens that stand for it, or where they are (env:NAME or file:PATH). Empty: nobody can ask as this tenant.
    keys: tuple[str, ...] = ()
    #: Its weight, for full nodes and places to wait, against the tenants that wait at the same moment.
    share: float = 1.0
    #: Highest priority it may ask for; a request for more is answered 403.
    priority_max: int = PRIORITY_MAX
    #: Most urgent service class it may ask for; a request for a more urgent one is answered 403.
    class_max: ServiceClass = ServiceClass.CADENCE
    #: Class of its requests that name none; None: `limits.service_class`.
    service_class: ServiceClass | None = None
    #: Requests a second, saved up for at most `BURST_S` of `core/cluster/rates.py`; one more is answered 429. 0: any number.
    requests_per_s: float = 0.0
    #: Tokens a second, of prompts (cached or not) when a request is let in and of output when it ends. 0: any number.
    tokens_per_s: float = 0.0
    #: Requests waiting or running; one more is answered 429. 0: `limits.tenant_requests_max`.
    requests_max: int = 0
    #: Bytes that its leases may have of a tier (hbm, cpu, cmx), such as {hbm = 2_000_000_000}; less is granted beyond it.
    #: A tier that is not named: the tenant's share of what pools leave for leases (`scheduler.leased_share_max`).
    pinned_bytes_max: Mapping[str, int] = field(default_factory=lambda: {})
    #: Byte-seconds a second that its leases may take: the bytes pinned on average over an hour. A lease costs its bytes times its
    #: seconds when it is placed. 0: any number.
    pinned_byte_s_per_s: float = 0.0

    def __post_init__(self) -> None:
        right = 1 <= len(self.name) <= TENANT_CHARS_MAX
        require(right, "name", f"must have 1 to {TENANT_CHARS_MAX} characters, has {len(self.name)}")
        for index, key in enumerate(self.keys):
            require(bool(key), f"keys[{index}]", "must not be empty")
        require(SHARE_MIN <= self.share <= SHARE_MAX, "share", f"must be {SHARE_MIN:g} to {SHARE_MAX:g}, is {self.share}")
        for tier, most in self.pinned_bytes_max.items():
            where = f"pinned_bytes_max.{tier}"
            require(tier in tuple(Tier), where, f"no such tier; known here: {', '.join(Tier)}")
            require(most >= 0, where, f"must be 0 or more bytes, is {most}")
        for name in ("requests_per_s", "tokens_per_s", "pinned_byte_s_per_s"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), name, f"must be 0 or more a second, is {value}")
        within = abs(self.priority_max) <= PRIORITY_MAX
        require(within, "priority_max", f"must be -{PRIORITY_MAX} to {PRIORITY_MAX}, is {self.priority_max}")
        require(self.requests_max >= 0, "requests_max", f"must be 0 or more, is {self.requests_max}")


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """[gateway]: the front door."""

    #: Gateways to start; a session is always served by the same one, whichever is asked.
    count: int = 1
    #: Address the HTTP and gRPC servers listen on.
    host: str = "127.0.0.1"
    #: First gateway's HTTP port; the others count up from it. 0: any free port.
    http_port: int = 8000
    #: First gateway's gRPC port (health, reflection); the others count up, so keep both at least `count` apart. 0: any free port.
    grpc_port: int = 8001
    #: Seconds a gateway that drains goes on refusing at least, so that load balancers see that it is not ready before it is gone.
    linger_s: float = 1.0
    #: Request headers that name a session, the first present wins; `orchestrator/README.md` lists the others.
    session_headers: tuple[str, ...] = (
        "x-dynamo-session-id",
        "x-claude-code-agent-id",
        "x-claude-code-session-id",
        # Codex's agents, each with one of its own within their session-id.
        "thread-id",
        "session-id",
        "session_id",
        "x-session-id",
        "x-session-affinity",
        "x-session-token",
        "x-correlation-id",
        "x-smg-routing-key",
    )
    #: Largest request body, bytes.
    body_bytes_max: int = 64 * 1024 * 1024
    #: PEM files, on each gateway's host, of the certificate that HTTP and gRPC are served with, and of its key; the same on all
    #: gateways. Empty: plain.
    cert: str = ""
    key: str = ""
    #: Generations one request may ask for: its prompts times n. All are admitted or none.
    generations_max: int = 128
    #: Web pages from these origins (such as https://app.example.com; * for all) may call the API; empty: no page may.
    cors_origins: tuple[str, ...] = ()
    #: Key that `/metrics` asks for, or where it is (env:NAME or file:PATH). Empty: any tenant's key does, and none is asked
    #: for where there are no tenants.
    metrics_key: str = ""
    #: Prompts whose text and tokens are kept so that a next turn tokenises only what is new; models and tenants share equally.
    prompts_cached_max: int = 4096
    #: Characters kept in all of them together.
    prompt_chars_cached_max: int = 512 * 1024 * 1024
    #: Blocks of sessions' last prompts whose names are kept, so that harnesses can speak of them (`weft.cache.v1`); tenants share
    #: equally. About 60 bytes each, most of them in common with what is kept of prompts.
    chain_blocks_max: int = 1_000_000
    #: Responses kept (`/v1/responses`), so that a next turn can go on from them; tenants share equally.
    responses_max: int = 100_000
    #: Bytes of all of them together.
    responses_bytes_max: int = 1024 * 1024 * 1024
    #: Seconds for which a response is kept after its last use.
    responses_s_max: float = 86_400.0
    #: Custom Ray resources one gateway asks for.
    resources: Mapping[str, float] = field(default_factory=lambda: {})

    def __post_init__(self) -> None:
        require(1 <= self.count <= GATEWAYS_MAX, "count", f"must be 1 to {GATEWAYS_MAX}, is {self.count}")
        for name, port in (("http_port", self.http_port), ("grpc_port", self.grpc_port)):
            require(0 <= port <= 65535, name, f"must be a port (0 to 65535), is {port}")
        require(self.linger_s >= 0, "linger_s", f"must be 0 or more seconds, is {self.linger_s}")
        require(self.body_bytes_max > 0, "body_bytes_max", f"must be over 0, is {self.body_bytes_max}")
        require(bool(self.cert) == bool(self.key), "cert", "cert and key must be given together")
        require(self.generations_max > 0, "generations_max", f"must be over 0, is {self.generations_max}")
        for name in ("prompts_cached_max", "chain_blocks_max", "responses_max", "responses_bytes_max", "responses_s_max"):
            require(getattr(self, name) > 0, name, f"must be over 0, is {getattr(self, name)}")

    @property
    def loopback(self) -> bool:
        """Whether only processes of the same host can ask."""
        return self.host in ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """[limits]: how much is let in; per gateway, but for `tenant_requests_max`."""

    #: Requests that wait because every node is full; one more is answered 529.
    waiting_max: int = 1024
    #: Requests of one tenant waiting or running, over all gateways; one more is answered 429.
    tenant_requests_max: int = 4096
    #: Seconds a request waits before it is answered 503.
    waiting_s_max: float = 60.0
    #: Seconds a request may take altogether before it is ended with 504.
    request_s_max: float = 600.0
    #: Sessions remembered.
    sessions_max: int = 100_000
    #: A node takes no new request while it has this many waiting.
    node_waiting_max: int = 64
    #: Times a request is tried again on another node before its first token; and, when it goes on, before its next one.
    retries_max: int = 2
    #: Times a request goes on elsewhere after its node was lost, or failed, once tokens were delivered; then it ends with 502.
    resumes_max: int = 8
    #: Class of requests that name none, where their tenant has none either.
    service_class: ServiceClass = ServiceClass.STANDARD

    def __post_init__(self) -> None:
        for name in ("waiting_max", "tenant_requests_max", "sessions_max", "node_waiting_max"):
            require(getattr(self, name) >= 1, name, f"must be 1 or more, is {getattr(self, name)}")
        for name in ("waiting_s_max", "request_s_max"):
            require(getattr(self, name) > 0, name, f"must be over 0 seconds, is {getattr(self, name)}")
        for name in ("retries_max", "resumes_max"):
            most = ATTEMPTS_MAX // 2
            require(0 <= getattr(self, name) <= most, name, f"must be 0 to {most}, is {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class LeasesConfig:
    """[leases]: how much of the cluster's KV memory tenants may pin (`weft.cache.v1`), and for how long."""

    #: Seconds a lease lasts at most; more is granted as so many.
    ttl_s_max: float = 86_400.0
    #: Leases of one tenant; one more is rejected.
    leases_max: int = 1024
    #: Actions of one tenant that a gateway remembers, so that the same one sent again has no second effect.
    actions_remembered_max: int = 16_384

    def __post_init__(self) -> None:
        within = 1 <= self.ttl_s_max <= LEASE_S_MAX
        require(within, "ttl_s_max", f"must be 1 to {LEASE_S_MAX:g} seconds, is {self.ttl_s_max}")
        for name in ("leases_max", "actions_remembered_max"):
            require(getattr(self, name) >= 1, name, f"must be 1 or more, is {getattr(self, name)}")


class RouterPolicy(StrEnum):
    """How nodes are chosen: ours, and the field's baselines."""

    PREDICTED_TIME = "predicted-time"
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    POWER_OF_TWO = "power-of-two"
    LEAST_LOADED = "least-loaded"
    DYNAMO = "dynamo"
    SGLANG = "sglang"


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """[router]: how nodes are chosen."""

    policy: RouterPolicy = RouterPolicy.PREDICTED_TIME
    #: A node may have this times the mean predicted work of its pool before it is passed over.
    load_factor_max: float = 1.5
    #: Seconds of predicted work below which no node counts as overloaded.
    load_floor_s: float = 0.05
    #: Uncached prompt tokens from which the prefill pool is used; None: whatever is predicted to be sooner.
    disaggregation_tokens_min: int | None = None
    #: Seed of random choices.
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.load_factor_max >= 1, "load_factor_max", f"must be 1 or more, is {self.load_factor_max}")
        require(self.load_floor_s >= 0, "load_floor_s", f"must be 0 or more seconds, is {self.load_floor_s}")
        least = self.disaggregation_tokens_min
        require(least is None or least >= 0, "disaggregation_tokens_min", f"must be 0 or more tokens, is {least}")


#: Names of parsers for tool calls, and the style each stands for: ours, and what vLLM and SGLang call the same.
TOOL_PARSERS: Mapping[str, str] = {
    "auto": "auto",
    "hermes": "hermes", "qwen": "hermes", "qwen25": "hermes", "qwen3_json": "hermes",
    "qwen3_coder": "qwen3_coder", "qwen3_xml": "qwen3_coder",
    "llama": "llama", "llama3": "llama", "llama3_json": "llama", "llama4_json": "llama",
    "pythonic": "pythonic", "llama4_pythonic": "pythonic",
    "mistral": "mistral",
    "deepseek": "deepseek", "deepseek_v3": "deepseek", "deepseek_v31": "deepseek", "deepseekv3": "deepseek",
    "deepseekv31": "deepseek",
    "kimi_k2": "kimi_k2",
    "harmony": "harmony", "openai": "harmony", "gpt_oss": "harmony", "gpt-oss": "harmony",
    "none": "none",
}  # fmt: skip
#: The same of parsers for thoughts.
REASONING_PARSERS: Mapping[str, str] = {
    "auto": "auto",
    "think": "think", "qwen3": "think", "qwen3_thinking": "think", "deepseek_r1": "think", "deepseek_v3": "think",
    "deepseek-r1": "think", "deepseek-v3": "think", "kimi_k2": "think", "glm45": "think",
    "harmony": "harmony", "openai_gptoss": "harmony", "gpt_oss": "harmony", "gpt-oss": "harmony",
    "none": "none",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """[models.NAME.adapters.ADAPTER]: a LoRA adapter of the model, which clients ask for by its name as for any model."""

    #: Directory as PEFT writes it (adapter_config.json, adapter_model.safetensors), the same on every host of a gateway or of the
    #: model's nodes; adapters that differ are refused.
    path: str
    #: Other names clients may use; a trailing * matches any ending.
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.path), "path", "must not be empty")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """[models.NAME]: one model and the names it answers to."""

    #: Hugging Face checkpoint directory, the same on every host of a gateway or of this model's nodes; checkpoints that differ
    #: are refused. Empty: the small built-in random model.
    path: str = ""
    #: Other names clients may use; a trailing * matches any ending.
    aliases: tuple[str, ...] = ()
    #: Parser for tool calls in the output: auto (by the chat template), or one of `TOOL_PARSERS`.
    tool_parser: str = "auto"
    #: How thoughts are told from answers: auto (by the chat template), or one of `REASONING_PARSERS`.
    reasoning_parser: str = "auto"
    #: For pools with hardware: a built-in model shape (kimi-k2, deepseek-v3, ...) or the path of a config.json. Empty: that in
    #: `path`.
    shape: str = ""
    #: LoRA adapters by name. All of them are in every node's memory, and one step computes for several of them and for the model
    #: itself. Tokenizer and chat template are the model's.
    adapters: Mapping[str, AdapterConfig] = field(default_factory=lambda: {})
    #: Greatest rank of an adapter: a node's memory for them is that of the greatest rank there is, for each.
    adapter_rank_max: int = 64

    def __post_init__(self) -> None:
        require(len(self.adapters) <= ADAPTERS_MAX, "adapters", f"must be {ADAPTERS_MAX} at most, are {len(self.adapters)}")
        require(all(self.adapters), "adapters", "an adapter's name must not be empty")
        most = ADAPTER_RANK_MAX
        within = 1 <= self.adapter_rank_max <= most
        require(within, "adapter_rank_max", f"must be 1 to {most}, is {self.adapter_rank_max}")
        for name, value, known in (
            ("tool_parser", self.tool_parser, TOOL_PARSERS),
            ("reasoning_parser", self.reasoning_parser, REASONING_PARSERS),
        ):
            require(value in known, name, f"must be one of {', '.join(dict.fromkeys(known.values()))}, is {value!r}")


class KvFormat(StrEnum):
    """How KV blocks look outside of engines' pools."""

    PLAIN = "plain"  # as in the pool
    FP8 = "fp8"  # E4M3 with a scale for each block, layer, head, and keys or values
    NVFP4 = "nvfp4"  # E2M1 with a scale for every 16 values and one above them


class SpeculationMethod(StrEnum):
    """Where drafted tokens come from."""

    OFF = "off"
    PROMPT_LOOKUP = "prompt_lookup"  # what followed the sequence's last tokens where they stood before, in prompt or output
    DRAFT_MODEL = "draft_model"  # that, and where nothing is found what a smaller model says


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """[pools.engine.speculation]: tokens drafted ahead and verified together; what comes out is the same, sooner."""

    #: off, prompt_lookup (agents repeat what they have read: files, tools' output, their own calls), or draft_model (that, and
    #: where nothing is found a smaller model).
    method: SpeculationMethod = SpeculationMethod.OFF
    #: Tokens drafted for a sequence in one step at most; fewer where that pays more, none where it does not pay.
    draft_tokens_max: int = 8
    #: For the profiled engine and for simulating, which know no text: the chance that a drafted token is accepted after all
    #: before it were.
    acceptance: float = 0.5
    #: The smaller model: a checkpoint directory with the vocabulary of the pool's model, the same on every host of its nodes. It
    #: is loaded beside that, on the same device, as its checkpoint has it.
    draft_model: str = ""
    #: Instead of that: a pool of kind lpx with a [pools.drafter] table, whose processes draft for the nodes of this one.
    draft_pool: str = ""
    #: Tokens of a sequence that it sees at most, the last ones: with half of them it begins when these are full. More is drafted
    #: better, and costs memory and time to read.
    draft_context_tokens_max: int = DRAFT_CONTEXT_TOKENS
    #: Sequences of which it keeps what it has read, at most. 0: as many as run together, as far as an eighth of the memory for
    #: KV holds them.
    draft_sequences_max: int = 0

    def __post_init__(self) -> None:
        most = DRAFT_TOKENS_MAX
        within = 1 <= self.draft_tokens_max <= most
        require(within, "draft_tokens_max", f"must be 1 to {most} tokens, is {self.draft_tokens_max}")
        require(0 <= self.acceptance < 1, "acceptance", f"must be in [0, 1), is {self.acceptance}")
        for name in ("draft_model", "draft_pool"):
            idle = not getattr(self, name) or self.method is SpeculationMethod.DRAFT_MODEL
            require(idle, name, f"is for method draft_model, method is {self.method}")
        one = not (self.draft_model and self.draft_pool)
        require(one, "draft_pool", "stands instead of draft_model, which is given as well")
        least, context = DRAFT_CONTEXT_TOKENS_MIN, self.draft_context_tokens_max
        require(context >= least, "draft_context_tokens_max", f"must be {least} or more tokens, is {context}")
        require(self.draft_sequences_max >= 0, "draft_sequences_max", f"must be 0 or more, is {self.draft_sequences_max}")
        if self.draft_pool:
            for name, default in (("draft_context_tokens_max", DRAFT_CONTEXT_TOKENS), ("draft_sequences_max", 0)):
                theirs = name.removeprefix("draft_")
                require(getattr(self, name) == default, name, f"is for draft_model; pool {self.draft_pool} has drafter.{theirs}")

    @property
    def tokens_max(self) -> int:
        """Tokens that are drafted for a sequence in one step at most; 0: none ever are."""
        return 0 if self.method is SpeculationMethod.OFF else self.draft_tokens_max


class WeightFormat(StrEnum):
    """How the weights of linear layers and experts lie in an engine's memory."""

    AUTO = "auto"  # as the checkpoint has them
    FP8 = "fp8"  # E4M3, and a scale for a row or a block
    NVFP4 = "nvfp4"  # E2M1, a scale for every 16 values and one above them


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """[pools.engine]: what computes."""

    #: eager (PyTorch) or profiled (takes the profile's time and computes nothing).
    name: str = "eager"
    #: auto, cpu, cuda or cuda:N.
    device: str = "auto"
    #: auto (the checkpoint's), float32 or bfloat16.
    dtype: str = "auto"
    #: auto (as the checkpoint has them), fp8 or nvfp4: what linear layers and experts of an unquantised checkpoint are rounded to
    #: when it is loaded; the same in all pools of a model. Embedding, head, routers and norms stay.
    weights: WeightFormat = WeightFormat.AUTO
    #: Tokens in a KV block; the same in all pools of a model.
    block_tokens: int = 64
    #: KV blocks of one node. 0: as many as `memory_fraction` of the device's free memory holds (on CPUs 2 GiB at most), and no
    #: more than `sequences_max` contexts need.
    blocks: int = 0
    memory_fraction: float = 0.8
    #: CPU threads of one node's engine. 0: cores divided by the nodes that share them.
    threads: int = 0
    #: Longest prompt plus output, tokens. 0: the model's own limit.
    context_tokens_max: int = 0
    #: How KV blocks are kept in the tiers below the pool and sent to other hosts; the same in all pools of a model. plain: as
    #: they are. fp8: in half the bytes of bfloat16. nvfp4: in 0.28 of them. What comes back of these two is no longer exact.
    kv_format_stored: KvFormat = KvFormat.PLAIN
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    def __post_init__(self) -> None:
        require(self.name in ("eager", "profiled"), "name", f"must be eager or profiled, is {self.name!r}")
        dtypes = ("auto", "float32", "bfloat16")
        require(self.dtype in dtypes, "dtype", f"must be one of {', '.join(dtypes)}, is {self.dtype!r}")
        has_weights = self.name == "eager" or self.weights is WeightFormat.AUTO
        require(has_weights, "weights", f"must be auto with the {self.name} engine, which has none, is {self.weights}")
        drafts = self.name == "eager" and self.speculation.method is SpeculationMethod.DRAFT_MODEL
        problem = "must name a checkpoint directory (or draft_pool a pool): method is draft_model"
        require(
            bool(self.speculation.draft_model or self.speculation.draft_pool) or not drafts, "speculation.draft_model", problem
        )
        computes = self.name == "eager" or not self.speculation.draft_pool
        require(computes, "speculation.draft_pool", f'needs name = "eager": engine {self.name} draws what is accepted')
        require(self.block_tokens >= 1, "block_tokens", f"must be 1 or more tokens, is {self.block_tokens}")
        require(0 < self.memory_fraction <= 1, "memory_fraction", f"must be in (0, 1], is {self.memory_fraction}")
        for name in ("blocks", "threads", "context_tokens_max"):
            require(getattr(self, name) >= 0, name, f"must be 0 or more, is {getattr(self, name)}")
        require(self.blocks <= BLOCKS_MAX, "blocks", f"must be at most {BLOCKS_MAX}, is {self.blocks}")


class CachePolicy(StrEnum):
    """Which of the blocks that nobody uses now is forgotten first."""

    LRU = "lru"
    VALUE = "value"


class Precision(StrEnum):
    """How numbers are stored and multiplied; NVFP4 has a scale for every 16 elements: 4.5 bits an element."""

    NVFP4 = "nvfp4"
    FP8 = "fp8"
    BF16 = "bf16"


class DecodeMode(StrEnum):
    """How a decode step is spread over processors."""

    PLAIN = "plain"  # attention and FFN on the node's own chips
    AFD = "afd"  # attention on the node's chips, FFN on `ffn_chip`s: activations cross in every layer
    WHOLE = "whole"  # all of decode on `ffn_chip`s, with their KV; the node's `chip` only names the partner for prices
    DRAFTER = "drafter"  # `ffn_chip`s draft, the node's own chips verify


@dataclass(frozen=True, slots=True)
class HardwareConfig:
    """[pools.hardware]: what the pool's nodes are made of; from it and the model's shape follow profile, blocks, price, power.

    A node is one attention rank: `chips` chips that hold one copy of a sequence's KV. `group_nodes` nodes step together and
    spread the experts over their chips (wide expert parallelism); the batch is taken to be equal on all of them. A pool may have
    fewer nodes than a group: the others are somebody else's.
    """

    #: Name of a chip profile: vr200, gb300, gb200, h200, ... Empty: no hardware is given, `[pools.profile]` counts.
    chip: str = ""
    #: Chips of one node; they share every layer (tensor parallelism).
    chips: int = 1
    #: Nodes that step together and share the experts.
    group_nodes: int = 1
    mode: DecodeMode = DecodeMode.PLAIN
    #: The chip of the other half, and how many of them serve one group.
    ffn_chip: str = ""
    ffn_chips: int = 0
    #: Micro-batches in flight between the halves: 1 one after the other, 2 or more ping-pong; 0: as many as make the pass of a
    #: full node shortest.
    microbatches: int = 2
    #: Of weights, of what is multiplied with them, of the KV cache.
    weights: Precision = Precision.FP8
    activations: Precision = Precision.FP8
    kv: Precision = Precision.FP8
    #: Of the weights on `ffn_chip` and of what is multiplied with them there; Groq's chip has no 4-bit numbers.
    ffn_weights: Precision = Precision.FP8
    #: Tokens drafted in each pass, and the chance that one is accepted after all before it were; None: as the profiles assume.
    draft_tokens: int = 0
    acceptance: float | None = None
    #: Chips of one host: as many nodes of the pool as they make share its memory.
    host_chips: int = 4
    #: How unevenly tokens choose experts: the k-th hottest one's load is k to the power of minus this, in an order drawn from
    #: `expert_seed`. 0: the busiest chip is as the profiles assume (`practice.expert_imbalance`).
    expert_skew: float = 0.0
    expert_seed: int = 0
    #: Slots of each chip for copies of hot experts; and whether experts are placed by load at all, or spread by number.
    spare_slots: int = 0
    balanced: bool = True

    def __post_init__(self) -> None:
        for name in ("chips", "host_chips", "group_nodes"):
            require(getattr(self, name) >= 1, name, f"must be 1 or more, is {getattr(self, name)}")
        for name in ("ffn_chips", "draft_tokens", "microbatches"):
            require(getattr(self, name) >= 0, name, f"must be 0 or more, is {getattr(self, name)}")
        require(self.spare_slots >= 0, "spare_slots", f"must be 0 or more, is {self.spare_slots}")
        skew = self.expert_skew
        require(isfinite(skew) and skew >= 0, "expert_skew", f"must be 0 or more, is {skew}")
        problem = "copies of hot experts need expert_skew, and balanced"
        require(not self.spare_slots or (skew > 0 and self.balanced), "spare_slots", problem)
        chance = self.acceptance
        require(chance is None or 0 <= chance < 1, "acceptance", f"must be in [0, 1), is {chance}")
        halves = self.mode is not DecodeMode.PLAIN
        require(halves == bool(self.ffn_chip), "ffn_chip", f"mode {self.mode.value} {'needs one' if halves else 'has none'}")
        require(halves == (self.ffn_chips > 0), "ffn_chips", f"mode {self.mode.value} {'needs some' if halves else 'has none'}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """[pools.scheduler]: how a node forms its steps."""

    #: Tokens computed in one step at most: long prompts are cut into chunks of what is left of it.
    step_tokens_max: int = 2048
    #: Sequences that run together at most.
    sequences_max: int = 256
    #: Requests that wait on the node at most; one more is refused back to its gateway.
    waiting_max: int = 1024
    #: Seconds a computed prompt's blocks are held for a decode node that does not come; where nothing runs and another prompt
    #: waits for them, `fetch_wait_s_max` if that is less.
    hold_s_max: float = 30.0
    #: Seconds a decode node may ask for a prompt whose assignment has not reached this node yet.
    fetch_wait_s_max: float = 5.0
    #: Seconds the source of a fetch may be silent before the rest is computed here. Long, since a prefill node says nothing
    #: while a prompt waits its turn; a source that is lost is told of by gateways, after `node_lost_s`.
    fetch_silent_s_max: float = 120.0
    #: KV batches kept for gateways that missed some.
    resync_batches_max: int = 4096
    #: Keep computed blocks for later requests with the same prefix.
    prefix_caching: bool = True
    #: Which unused blocks are forgotten first: lru (longest unused) or value (what saves least, by when it will be used again).
    cache: CachePolicy = CachePolicy.VALUE
    #: Blocks on their way to the host's store at most, as a share of the pool; further ones are offered as those are copied.
    offered_share_max: float = 0.25
    #: Blocks kept for leases at most, as a share of the pool.
    leased_share_max: float = 0.5
    #: Blocks brought before a request asks for them, and kept for it, at most, as a share of the pool; requests take them back.
    prefetched_share_max: float = 0.25

    def __post_init__(self) -> None:
        for name in ("step_tokens_max", "sequences_max", "waiting_max", "resync_batches_max"):
            require(getattr(self, name) >= 1, name, f"must be 1 or more, is {getattr(self, name)}")
        for name in ("hold_s_max", "fetch_wait_s_max", "fetch_silent_s_max"):
            require(getattr(self, name) > 0, name, f"must be over 0 seconds, is {getattr(self, name)}")
        for name in ("offered_share_max", "leased_share_max", "prefetched_share_max"):
            require(0 <= getattr(self, name) <= 1, name, f"must be a share, 0 to 1, is {getattr(self, name)}")
        require(
            self.step_tokens_max >= self.sequences_max,
            "step_tokens_max",
            f"must be at least sequences_max ({self.sequences_max}), is {self.step_tokens_max}",
        )


#: Blocks that one object of `cmx` may hold: it is written and read whole.
SEGMENT_BLOCKS_MAX = 1 << 10


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """[store]: KV below the engines' pools, kept by one process on every host that has nodes."""

    #: Bytes of the host's memory for KV that all its nodes share; their content outlives nodes.
    cpu_bytes: int = 4 << 30
    #: Each model's part of them, relative to the other models'; 1 for those that are not named.
    shares: Mapping[str, float] = field(default_factory=lambda: {})
    #: Where segments of KV go on to: file:///FOLDER, on each host, or s3://BUCKET/PREFIX, shared by all hosts. Empty: nowhere. A
    #: bucket's credentials are in each host's environment.
    cmx: str = ""
    #: Bytes of segments that a store keeps there; those used longest ago are deleted beyond.
    cmx_bytes: int = 64 << 30
    #: Blocks in a segment, the least that is moved to or from cmx.
    segment_blocks: int = 8
    #: Bytes that nodes may be writing into the memory at once; what else is offered then is not taken.
    offers_bytes_max: int = 1 << 30
    #: Bytes on their way to or from cmx at once. Half of them at most for what no prompt waits for.
    moves_bytes_max: int = 256 << 20
    #: Seconds that one such transfer may take before it is given up.
    move_s_max: float = 60.0
    #: Seconds for which memory that a lost node was copying is left alone.
    detached_s: float = 5.0
    #: Share of the memory that leases may keep from eviction, 0 to 1.
    leased_share_max: float = 0.75
    #: KV batches kept for gateways that missed some, a model.
    resync_batches_max: int = 4096
    #: What the router starts from before it has measured: bytes a second out of the memory, and out of cmx; seconds before the
    #: first byte from there.
    cpu_bytes_per_s: float = 10e9
    cmx_bytes_per_s: float = 1e9
    cmx_latency_s: float = 0.005

    def __post_init__(self) -> None:
        for model, one in self.shares.items():
            right = SHARE_MIN <= one <= SHARE_MAX
            require(right, f"shares.{model}", f"must be {SHARE_MIN:g} to {SHARE_MAX:g}, is {one}")
        known = not self.cmx or self.cmx.startswith(("file:///", "s3://"))
        require(known, "cmx", f"must be file:///FOLDER or s3://BUCKET/PREFIX, is {shown(self.cmx)}")
        most = SEGMENT_BLOCKS_MAX
        require(self.segment_blocks <= most, "segment_blocks", f"must be at most {most}, is {self.segment_blocks}")
        for name in ("cpu_bytes_per_s", "cmx_bytes_per_s"):
            require(getattr(self, name) > 0, name, f"must be over 0 bytes a second, is {getattr(self, name)}")
        latency = self.cmx_latency_s
        require(isfinite(latency) and latency >= 0, "cmx_latency_s", f"must be 0 or more seconds, is {latency}")
        for name in ("cpu_bytes", "segment_blocks", "offers_bytes_max", "moves_bytes_max", "resync_batches_max"):
            require(getattr(self, name) >= 1, name, f"must be 1 or more, is {getattr(self, name)}")
        for name in ("move_s_max", "detached_s"):
            require(getattr(self, name) > 0, name, f"must be over 0 seconds, is {getattr(self, name)}")
        require(self.cmx_bytes >= 0, "cmx_bytes", f"must be 0 or more, is {self.cmx_bytes}")
        require(0 <= self.leased_share_max <= 1, "leased_share_max", f"must be a share, 0 to 1, is {self.leased_share_max}")

    def part_bytes(self, model: str, models: Iterable[str]) -> int:
        """Return the bytes of the memory that a model has, on a host where these have nodes."""
        total = sum(self.shares.get(one, 1.0) for one in models)
        return int(self.cpu_bytes * self.shares.get(model, 1.0) / total)


def _check_profile(profile: CostProfile) -> None:
    """Raise `ConfigError` unless every step and every fetch takes a finite time of 0 or more, and more work no less of it."""
    times = "step_s", "prefill_token_s", "prefill_token_context_s", "sequence_s", "context_token_s", "fetch_latency_s"
    for name in (*times, "draft_step_s"):
        seconds = getattr(profile, name)
        require(isfinite(seconds) and seconds >= 0, f"profile.{name}", f"must be 0 or more seconds, is {seconds}")
    require(isfinite(profile.beat_s) and profile.beat_s >= 0, "profile.beat_s", f"must be 0 or more seconds, is {profile.beat_s}")
    rate, share, yielded = profile.fetch_bytes_per_s, profile.overlap, profile.tokens_per_pass
    require(rate > 0, "profile.fetch_bytes_per_s", f"must be over 0 bytes a second, is {rate}")  # inf: at once
    require(0 <= share <= 1, "profile.overlap", f"must be a share, 0 to 1, is {share}")
    require(profile.pass_tokens >= 1, "profile.pass_tokens", f"must be 1 or more, is {profile.pass_tokens}")
    require(isfinite(yielded) and yielded >= 1, "profile.tokens_per_pass", f"must be 1 or more, is {yielded}")
    _check_curve(profile)


def _check_curve(profile: CostProfile) -> None:
    tokens, seconds = profile.batch_tokens, profile.batch_s
    where = "profile.batch_s"
    require(len(tokens) == len(seconds), where, f"must have as many entries as batch_tokens ({len(tokens)}), has {len(seconds)}")
    for before, after in pairwise((0, *tokens)):
        require(before < after, "profile.batch_tokens", f"must be 1 or more and ascend, has {after} after {before}")
    # Where processors overlap, a point may lie below 0: what it lacks is in `step_s` (see `roofline.py`).
    for one in seconds:
        positive = profile.step_s + (1 - profile.overlap) * one >= 0
        require(isfinite(one) and positive, where, f"must be 0 or more seconds, step_s included, has {one}")
    # The last slope goes on for ever.
    require(len(seconds) < 2 or seconds[-2] <= seconds[-1], where, f"must not fall at its end, has {list(seconds[-2:])}")


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """[pools.split]: attention and FFN of the pool's nodes in different processes.

    Each node is an attention rank; some of them and the FFN ranks that they share are a group: it is placed, started and lost as
    one. FFN ranks hold what is behind attention in every layer, the experts above all. In a pool of kind lpx they keep its beat.
    """

    #: Nodes of one group; the pool's last group may have fewer.
    attention: int = 1
    #: FFN ranks of one group.
    ffn: int = 1
    #: Whether the ranks of one group may be on different hosts: activations cross by shared memory within one, else by TCP.
    #: False: a group is where one host has room for all of it.
    across_hosts: bool = False
    #: Into how many micro-batches a step is cut, so that one half computes while the other does. 0: as measured steps say; in a
    #: pool of kind lpx those at start, which decide once for all.
    microbatches: int = 0
    #: Slots of each FFN rank, and layer, for copies of experts that are asked for most.
    spare_slots: int = 0
    #: Experts are placed anew, layer by layer, where the busiest rank has by so much more to do than the mean. 0: never, as in
    #: pools of kind lpx.
    imbalance_max: float = 0.1
    #: Seconds between two looks at what experts had to do.
    balance_s: float = 10.0
    #: Seconds without an answer after which a rank, and with it the group, is lost.
    silent_s: float = 10.0
    #: Custom Ray resources, CPU cores and GPUs one FFN rank asks Ray for.
    resources: Mapping[str, float] = field(default_factory=lambda: {})
    cpus: float = 0.0
    gpus: float = 0.0
    #: CPU threads of one FFN rank. 0: as torch chooses, or as many as `beat.ffn_cores`.
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("attention", "ffn"):
            require(1 <= getattr(self, name) <= RANKS_MAX, name, f"must be 1 to {RANKS_MAX}, is {getattr(self, name)}")
        fits = 0 <= self.microbatches <= MICROBATCHES_MAX
        require(fits, "microbatches", f"must be 0 to {MICROBATCHES_MAX}, is {self.microbatches}")
        for name in ("spare_slots", "imbalance_max", "cpus", "gpus", "threads"):
            require(getattr(self, name) >= 0, name, f"must be 0 or more, is {getattr(self, name)}")
        for name in ("balance_s", "silent_s"):
            require(getattr(self, name) > 0, name, f"must be over 0, is {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class BeatConfig:
    """[pools.beat]: how the engine of a node that keeps a beat comes to be on time; for engines that compute."""

    #: Cores of its host that a node's engine runs on, with as many threads unless `engine.threads` says otherwise; empty: any.
    #: Nodes of a pool that share a host share them.
    cores: tuple[int, ...] = ()
    #: The same for FFN ranks (`split`).
    ffn_cores: tuple[int, ...] = ()
    #: Priority of a node's engine and of FFN ranks, 1 to 99, before everything that has less or none; the process that an engine
    #: gets its orders from has one less, at least 1 (SCHED_FIFO, which takes CAP_SYS_NICE). 0: none.
    realtime: int = 0
    #: Seconds before each beat in which the engine looks at the clock all the time, because sleepers are woken late.
    spin_s: float = 0.0002

    def __post_init__(self) -> None:
        for name in ("cores", "ffn_cores"):
            cores = getattr(self, name)
            distinct = len(set(cores)) == len(cores) and all(core >= 0 for core in cores)
            require(distinct, name, f"must be different numbers from 0 on, are {list(cores)}")
        require(0 <= self.realtime <= REALTIME_MAX, "realtime", f"must be 0 to {REALTIME_MAX}, is {self.realtime}")
        require(0 <= self.spin_s <= SPIN_S_MAX, "spin_s", f"must be 0 to {SPIN_S_MAX} seconds, is {self.spin_s}")


#: Tokens that a draft model of a pool sees of a sequence at most: it is told of as many in one message.
DRAFT_CONTEXT_TOKENS_MAX = 1 << 16
#: Sequences that one process drafts for at most.
DRAFT_SLOTS_MAX = 1 << 12


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """[pools.drafter]: what a pool of kind lpx drafts with, which serves no requests: `engine.speculation.draft_pool` names it.

    Each of its `nodes` is a process that holds the draft model; nodes of the pool's `model` ask one of them, of their own host if
    there is one. Of its `engine` device, dtype, block_tokens, memory_fraction and threads count.
    """

    #: The draft model: a checkpoint directory with the vocabulary of the pool's model, the same on every host of this pool.
    model: str
    #: Tokens of a sequence that it sees at most, the last ones: with half of them it begins when these are full.
    context_tokens_max: int = DRAFT_CONTEXT_TOKENS
    #: Slots of a process: sequences that it drafts for at a time, of all nodes together. A sequence that finds none is not
    #: drafted for. All passes take the time of that many.
    sequences_max: int = 16

    def __post_init__(self) -> None:
        require(bool(self.model), "model", "must name a checkpoint directory")
        least, context = DRAFT_CONTEXT_TOKENS_MIN, self.context_tokens_max
        within = least <= context <= DRAFT_CONTEXT_TOKENS_MAX
        require(within, "context_tokens_max", f"must be {least} to {DRAFT_CONTEXT_TOKENS_MAX} tokens, is {context}")
        slots = self.sequences_max
        require(1 <= slots <= DRAFT_SLOTS_MAX, "sequences_max", f"must be 1 to {DRAFT_SLOTS_MAX}, is {slots}")


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """[[pools]]: nodes of one kind for one model."""

    name: str
    kind: PoolKind
    #: Name of a [models.NAME] table.
    model: str = "default"
    #: Nodes in the pool.
    nodes: int = 1
    #: Nodes that share one process. Only for the profiled engine, to load a large cluster's orchestrator from one machine.
    nodes_per_process: int = 1
    #: Custom Ray resources one process asks for, such as {nvl72 = 1}.
    resources: Mapping[str, float] = field(default_factory=lambda: {})
    #: CPU cores and GPUs one process asks Ray for.
    cpus: float = 0.0
    gpus: float = 0.0
    #: How blocks come in from other nodes: auto (shared memory on one host, else Ray), shm, ray.
    transport: str = "auto"
    engine: EngineConfig = field(default_factory=EngineConfig)
    #: None: each node computes whole layers by itself.
    split: SplitConfig | None = None
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    #: What a step costs; the profiled engine takes this time, the router predicts with it and corrects it by measurement.
    profile: CostProfile = field(default_factory=CostProfile)
    #: What the nodes are made of, for simulating them and for prices.
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    #: Of a pool of kind lpx.
    beat: BeatConfig = field(default_factory=BeatConfig)
    #: None: the pool serves requests.
    drafter: DrafterConfig | None = None

    def __post_init__(self) -> None:
        require(bool(self.name), "name", "must not be empty")
        for taken in (GATEWAYS, STORES):
            require(self.name != taken, "name", f'"{taken}" is what commands call the {taken}')
        _check_profile(self.profile)
        if self.drafter is not None:
            self._check_drafting()
        beats, beat_s = self.kind is PoolKind.LPX and self.drafter is None, self.profile.beat_s
        problem = f"must be over 0 seconds in a pool of kind lpx, and 0 in any other, is {beat_s} in one of kind {self.kind}"
        require(beats == (beat_s > 0), "profile.beat_s", problem)
        require(
            self.kind is PoolKind.LPX or self.beat == BeatConfig(),
            "beat",
            f"is for pools of kind lpx, this one is of kind {self.kind}",
        )
        if beats:
            self._check_beating()
        require(1 <= self.nodes <= NODES_MAX, "nodes", f"must be 1 to {NODES_MAX}, is {self.nodes}")
        require(self.nodes_per_process >= 1, "nodes_per_process", f"must be 1 or more, is {self.nodes_per_process}")
        alone = self.nodes_per_process == 1 or self.engine.name == "profiled"
        require(alone, "nodes_per_process", 'more than 1 needs engine.name = "profiled"')
        if self.split is not None:
            require(self.engine.name == "eager", "split", 'needs engine.name = "eager": others have no halves')
            require(self.kind.generates, "split", "is for pools that generate; prefill nodes compute whole layers")
        known = ("auto", "shm", "ray")
        require(self.transport in known, "transport", f"must be one of {', '.join(known)}, is {self.transport!r}")
        for name in ("cpus", "gpus"):
            require(getattr(self, name) >= 0, name, f"must be 0 or more, is {getattr(self, name)}")
        once = not self.engine.speculation.tokens_max or (self.profile.pass_tokens == 1 and not self.hardware.draft_tokens)
        where = "engine.speculation.method"
        require(once, where, "must be off where hardware.draft_tokens or profile.pass_tokens count drafted tokens already")
        modelled = self.engine.speculation.method is SpeculationMethod.DRAFT_MODEL
        require(self.kind.generates or not modelled, where, "draft_model is for pools that generate; prefill nodes draft nothing")

    def _check_beating(self) -> None:
        """Raise `ConfigError` for what a node that keeps a beat has not."""
        split = self.split
        halves = split is not None or not self.beat.ffn_cores
        require(halves, "beat.ffn_cores", "is for pools with a [pools.split] table: others have no FFN ranks")
        if split is not None:
            # The beat holds wherever experts are; loading others would take time from it.
            stay = "must be 0 in a pool of kind lpx, whose experts stay where they are"
            for name in ("imbalance_max", "spare_slots"):
                value = getattr(split, name)
                require(not value, f"split.{name}", f"{stay}; is {value}")
        one = not self.engine.speculation.tokens_max
        require(one, "engine.speculation.method", "must be off in a pool of kind lpx: each beat brings one token")

    def _check_drafting(self) -> None:
        """Raise `ConfigError` for what a pool that drafts has not, and cannot be told."""
        kind = self.kind is PoolKind.LPX
        require(kind, "drafter", f"is for pools of kind lpx, this one is of kind {self.kind}")
        require(self.split is None, "split", "is for pools that serve requests; this one drafts, and a draft model is whole")
        idle = {
            "scheduler": (self.scheduler, SchedulerConfig()),
            "profile": (self.profile, CostProfile()),
            "hardware": (self.hardware, HardwareConfig()),
            "transport": (self.transport, "auto"),
            "nodes_per_process": (self.nodes_per_process, 1),
            "engine.name": (self.engine.name, "eager"),
            "engine.speculation": (self.engine.speculation, SpeculationConfig()),
            "engine.weights": (self.engine.weights, WeightFormat.AUTO),
            "engine.blocks": (self.engine.blocks, 0),
            "engine.context_tokens_max": (self.engine.context_tokens_max, 0),
            "engine.kv_format_stored": (self.engine.kv_format_stored, KvFormat.PLAIN),
            "beat.ffn_cores": (self.beat.ffn_cores, ()),
            "beat.spin_s": (self.beat.spin_s, BeatConfig().spin_s),
        }
        for where, (given, default) in idle.items():
            hint = "; what a pass takes is profile.draft_step_s of the pools that it drafts for" if where == "profile" else ""
            require(given == default, where, f"is for pools that serve requests, this one drafts for others{hint}")

    def node_id(self, number: int) -> NodeId:
        """Return what the pool's node of that number is called."""
        return NodeId(f"{self.name}-{number}")

    def node_spec(
        self,
        node: NodeId,
        incarnation: int,
        profile: CostProfile,
        *,
        blocks: int,
        block_tokens: int,
        block_bytes: int,
        context_tokens_max: int,
        address: str = "",
        host: str = "",
        stores: bool = False,
    ) -> NodeSpec:
        """Return a node of the pool: what this file says of it, what its steps cost, and the sizes that its engine has."""
        return NodeSpec(
            id=node,
            model=ModelName(self.model),
            pool=PoolName(self.name),
            kind=self.kind,
            incarnation=incarnation,
            blocks=blocks,
            block_tokens=block_tokens,
            block_bytes=block_bytes,
            leased_blocks_max=int(blocks * self.scheduler.leased_share_max),
            sequences_max=self.scheduler.sequences_max,
            step_tokens_max=self.scheduler.step_tokens_max,
            context_tokens_max=context_tokens_max,
            profile=profile,
            address=address,
            host=host,
            stores=stores,
            draft_tokens_max=self.engine.speculation.tokens_max,
            draft_model=self.engine.speculation.method is SpeculationMethod.DRAFT_MODEL,
        )


@dataclass(frozen=True, slots=True)
class Named:
    """What a client's name stands for: a model, or one with an adapter."""

    model: ModelName
    adapter: AdapterName | None = None

    @property
    def label(self) -> ModelName:
        """Its own name, whichever alias was asked for."""
        return ModelName(self.adapter or self.model)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A whole cluster file."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    leases: LeasesConfig = field(default_factory=LeasesConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    #: None: KV is in the engines' pools alone.
    store: StoreConfig | None = None
    models: Mapping[str, ModelConfig] = field(default_factory=lambda: {"default": ModelConfig()})
    pools: tuple[PoolConfig, ...] = ()
    log: LogConfig = field(default_factory=LogConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    #: Who may ask. Empty: no key is asked for, which only a loopback `gateway.host` may do.
    tenants: tuple[TenantConfig, ...] = ()

    def __post_init__(self) -> None:
        host = self.gateway.host
        named = self.gateway.loopback or bool(self.tenants)
        require(named, "gateway.host", f"{host} is not loopback, so at least one [[tenants]] table is needed")
        self._check_tenants()
        require(len(self.pools) > 0, "pools", "at least one [[pools]] table is needed")
        names = [pool.name for pool in self.pools]
        for index, pool in enumerate(self.pools):
            require(names.count(pool.name) == 1, f"pools[{index}].name", f"{pool.name!r} is used twice")
            known = ", ".join(self.models)
            require(pool.model in self.models, f"pools[{index}].model", f"no [models.{pool.model}] table; there are: {known}")
        self._check_drafts()
        for model in self.models:
            self._check_model(model)
        self._check_adapters()
        for model in self.store.shares if self.store is not None else ():
            require(
                model in self.models, f"store.shares.{model}", f"no [models.{model}] table; there are: {', '.join(self.models)}"
            )

    def check_gateways(self, count: int) -> None:
        """Raise `ConfigError` unless so many gateways can each have a part of every tenant's limit on requests under way."""
        limits = {f"tenants[{index}].requests_max": tenant.requests_max for index, tenant in enumerate(self.tenants)}
        for where, most in {"limits.tenant_requests_max": self.limits.tenant_requests_max, **limits}.items():
            require(not most or most >= count, where, f"must be at least 1 for each of {count} gateways, is {most}")

    def _check_tenants(self) -> None:
        """See that each name and each key stands for one tenant; keys are never shown."""
        owners: dict[str, str] = {}
        names = [tenant.name for tenant in self.tenants]
        for number, tenant in enumerate(self.tenants):
            require(names.count(tenant.name) == 1, f"tenants[{number}].name", f"{tenant.name!r} is used twice")
            for index, key in enumerate(tenant.keys):
                where = f"tenants[{number}].keys[{index}]"
                require(key not in owners, where, f"is a key of {owners.get(key)} already")
                owners[key] = tenant.name

    def _check_drafts(self) -> None:
        """See that each pool that is to be drafted for names one that drafts for its model, and that each of those is named."""
        drafting = {pool.name: pool for pool in self.pools if pool.drafter is not None}
        named: set[str] = set()
        for index, pool in enumerate(self.pools):
            wanted = pool.engine.speculation.draft_pool
            if not wanted:
                continue
            where = f"pools[{index}].engine.speculation.draft_pool"
            problem = f"no pool {wanted!r} has a [pools.drafter] table; there are: {', '.join(drafting) or 'none'}"
            require(wanted in drafting, where, problem)
            model = drafting[wanted].model
            require(model == pool.model, where, f"pool {wanted} drafts for model {model}, this one is of model {pool.model}")
            named.add(wanted)
        for index, pool in enumerate(self.pools):
            used = pool.drafter is None or pool.name in named
            require(used, f"pools[{index}].drafter", "no pool names this one in engine.speculation.draft_pool")

    @property
    def serving_pools(self) -> tuple[PoolConfig, ...]:
        """The pools that serve requests, whose processes are nodes: all but those that draft."""
        return tuple(pool for pool in self.pools if pool.drafter is None)

    def _check_model(self, model: str) -> None:
        pools = self.pools_of(model)
        kinds = {pool.kind for pool in pools}
        serves = bool(kinds & {PoolKind.DECODE, PoolKind.AGGREGATED})
        require(serves, f"models.{model}", "no pool of kind decode or aggregated serves it")
        computed = PoolKind.LPX not in kinds or PoolKind.PREFILL in kinds
        require(computed, f"models.{model}", "no pool of kind prefill computes prompts for its pool of kind lpx")
        for name in ("block_tokens", "kv_format_stored", "weights"):
            found = sorted({getattr(pool.engine, name) for pool in pools})
            require(len(found) == 1, f"models.{model}", f"its pools differ in engine.{name}: {', '.join(map(str, found))}")
        for name in ("name", "dtype") if self.store is not None else ():
            found = sorted({getattr(pool.engine, name) for pool in pools})
            problem = f"its pools differ in engine.{name}, so that they cannot share a store: {', '.join(found)}"
            require(len(found) == 1, f"models.{model}", problem)

    def _check_adapters(self) -> None:
        """See that each adapter's name is its own, and that all pools of its model can compute with it."""
        aliases = {alias for named in self._aliases().values() for alias in named}
        seen: set[str] = set()
        for model, config in self.models.items():
            for name in config.adapters:
                where = f"models.{model}.adapters.{name}"
                require(name not in self.models, where, f"[models.{name}] has that name already")
                require(name not in seen, where, "an adapter of another model has that name already")
                require(name not in aliases, where, "is an alias already")
                seen.add(name)
            kept = next((pool.name for pool in self.pools_of(model) if pool.kind is PoolKind.LPX), None)
            problem = f"pool {kept} is of kind lpx, whose engine keeps its beat for the model alone"
            require(not config.adapters or kept is None, f"models.{model}.adapters", problem)

    def _aliases(self) -> dict[Named, tuple[str, ...]]:
        """Return the further names of everything that clients may ask for."""
        found = {Named(ModelName(model)): config.aliases for model, config in self.models.items()}
        for model, config in self.models.items():
            for name, adapter in config.adapters.items():
                found[Named(ModelName(model), AdapterName(name))] = adapter.aliases
        return found

    def names(self) -> dict[str, Named]:
        """Return the names clients may ask for, and what they stand for; aliases that match by their beginning are left out."""
        aliases = self._aliases()
        further = [alias for ones in aliases.values() for alias in ones if not alias.endswith("*")]
        found = {name: self.named(name) for name in (*[named.label for named in aliases], *further)}
        return {name: named for name, named in found.items() if named is not None}

    def pools_of(self, model: str) -> tuple[PoolConfig, ...]:
        """Return the pools that serve a model, in the file's order."""
        return tuple(pool for pool in self.serving_pools if pool.model == model)

    def named(self, name: str) -> Named | None:
        """Return what a client's name stands for: its own, or the longest alias that matches; None if none does."""
        aliases = self._aliases()
        own = next((named for named in aliases if named.label == name), None)
        matching = [
            (len(alias), named.label, named)
            for named, ones in aliases.items()
            for alias in ones
            if alias == name or (alias.endswith("*") and name.startswith(alias[:-1]))
        ]
        return own or (max(matching, key=lambda match: match[:2])[2] if matching else None)

    def class_for(self, tenant: TenantId) -> ServiceClass:
        """Return the class of a tenant's requests that name none."""
        named = next((one.service_class for one in self.tenants if one.name == tenant), None)
        return named or self.limits.service_class

    @staticmethod
    def from_mapping(mapping: Mapping[str, Any]) -> "ClusterConfig":
        """Build a checked configuration from a parsed file. Raises `ConfigError` for unknown keys, wrong types and values."""
        config = cast(ClusterConfig, _build(ClusterConfig, mapping, ""))
        config.check_gateways(config.gateway.count)
        return config


def _build(kind: type, mapping: Any, where: str) -> Any:
    """Build dataclass `kind` from a mapping; every problem becomes a `ConfigError` with the full dotted path."""
    require(isinstance(mapping, Mapping), where or "file", f"must be a table, is {type(mapping).__name__}")
    known = {item.name: item for item in fields(kind)}
    for key in mapping:
        former = _FORMER.get(_join(where, str(key)))
        require(former is None, _join(where, str(key)), former or "")
        require(key in known, _join(where, str(key)), f"unknown key; known here: {', '.join(known)}")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, item in known.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], _join(where, name))
        else:
            optional = item.default is not MISSING or item.default_factory is not MISSING
            require(optional, _join(where, name), "is missing")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(_join(where, error.where), error.problem) from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """Turn one TOML value into the hinted type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _value(next(kind for kind in arguments if kind is not type(None)), value, where)
    if origin is tuple:
        require(isinstance(value, list), where, f"must be a list, is {type(value).__name__}")
        return tuple(_value(arguments[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        require(isinstance(value, Mapping), where, f"must be a table, is {type(value).__name__}")
        return {key: _value(arguments[1], entry, _join(where, key)) for key, entry in value.items()}
    if is_dataclass(hint):
        return _build(cast(type, hint), value, where)
    if issubclass(hint, StrEnum):
        known = [str(member) for member in hint]
        require(value in known, where, f"must be one of {', '.join(known)}, is {shown(value)}")
        return hint(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(not whole or abs(value) <= WHOLE_MAX, where, f"must be at most 2^53, is {shown(value)}")
    if hint is float and whole:
        return float(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(right, where, f"must be {hint.__name__}, is {shown(value)}")
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
