"""Measures what one more turn costs the control plane, by the length of the context before it: warm, and as if seen first.

    python -m bench.turn [--json FILE]

A turn adds about 2,000 tokens (an assistant's tool call and the tool's result) to a conversation of hundreds of messages with
tools. Stages: parse (JSON to what is asked), render (chat template), encode (tokens and block hashes), route (the decision among
64 nodes, one of which holds the conversation so far). Figures are CPU milliseconds of all threads, the median of some turns; cold
means a gateway that has seen nothing of the conversation, and whose nodes hold nothing of it.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.blocks import hash_root
from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.commands import Assign
from orchestrator.core.config import ClusterConfig, PoolConfig
from orchestrator.core.events import Ended, FirstToken, NodeJoined, NodeReported, RequestArrived
from orchestrator.core.types import (
    CostProfile,
    FinishReason,
    GatewayId,
    KvBatch,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    Request,
    SessionId,
    StoredRun,
    TenantId,
    request_id,
)
from orchestrator.fleet.loops import serve_long
from orchestrator.live import asked
from orchestrator.live.http.openai.requests import parse_chat
from orchestrator.live.text.models import ModelText
from orchestrator.live.text.prompts import PromptTokeniser
from orchestrator.live.turns import Prompt
from workers.engines.vocabulary import write_json, write_tokenizer

CONTEXTS = (8_000, 32_000, 128_000, 400_000)
TURN_TOKENS = 2_000
#: Tokens of one exchange of two messages: a session of some 280 requests reaches 400,000 tokens with it.
EXCHANGE_TOKENS = 1_400
VOCABULARY = 8_000
NODES = 64
BLOCK_TOKENS = 64
WARM_TURNS = 7
STAGES = ("parse", "render", "encode", "route")
MODEL, TENANT, SESSION = ModelName("default"), TenantId("default"), SessionId("agent")
PROFILE = CostProfile(step_s=0.008, prefill_token_s=2e-5, prefill_token_context_s=1e-10, sequence_s=1e-4, context_token_s=1e-9)


@dataclass(frozen=True, slots=True)
class Row:
    """CPU milliseconds by stage at one length of context."""

    context_tokens: int
    warm: dict[str, float]
    cold: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times less the warm turn costs."""
        return sum(self.cold.values()) / sum(self.warm.values())


class Conversation:
    """A growing agent session, as the body of its next request."""

    def __init__(self, text: ModelText, seed: int) -> None:
        self._source = random.Random(seed)
        tokens = [text.tokenizer.decode([token]) for token in range(300, VOCABULARY - 3)]
        self._words = [word.strip() for word in tokens if word.strip().isalpha()]
        names = [f"tool_{number}" for number in range(20)]
        self.tools = [{"type": "function", "function": self._function(name)} for name in names]
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self._text(1500)}]

    def grow(self, tokens: int) -> None:
        """Add about so many tokens in exchanges of a call and its result."""
        while tokens > 0:
            count = min(tokens, EXCHANGE_TOKENS)
            self.messages += self._exchange(count)
            tokens -= count

    def body(self) -> bytes:
        """Return the next request."""
        return json.dumps({"model": MODEL, "messages": self.messages, "tools": self.tools, "stream": True}).encode()

    def _exchange(self, tokens: int) -> list[dict[str, Any]]:
        function = {"name": "tool_7", "arguments": json.dumps({"path": self._text(10), "text": self._text(tokens // 8)})}
        call = {"id": f"call_{len(self.messages)}", "type": "function", "function": function}
        result = self._text(tokens - tokens // 8 - 60)
        return [
            {"role": "assistant", "content": self._text(20), "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": result},
        ]

    def _function(self, name: str) -> dict[str, Any]:
        properties = {key: {"type": "string", "description": self._text(20)} for key in ("path", "text", "mode")}
        return {"name": name, "description": self._text(60), "parameters": {"type": "object", "properties": properties}}

    def _text(self, tokens: int) -> str:
        return " ".join(self._source.choices(self._words, k=max(tokens, 1)))


class ControlPlane:
    """What one gateway does before a request leaves it."""

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._prompts = PromptTokeniser(text.tokenizer, text.segmenter, text.prefix, BLOCK_TOKENS, 64, 1 << 28)
        self._root = hash_root(b"secret", text.fingerprint, TENANT)
        pool = PoolConfig("pool", PoolKind.AGGREGATED, nodes=NODES)
        self._cluster = Cluster(GatewayId(0), ClusterConfig(pools=(pool,)))
        self._serial = 0
        #: Batches each node has reported.
        self._sequences = {NodeId(f"node-{number}"): 0 for number in range(NODES)}
        for node in self._sequences:
            self._cluster.handle(NodeJoined(_spec(node)), 0.0)
            self._cluster.handle(NodeReported(node, _load(), kv=(KvBatch(0, cleared=True),)), 0.0)

    def turn(self, body: bytes) -> tuple[dict[str, float], Prompt]:
        """Take one request through all stages; return CPU milliseconds by stage, and its prompt."""
        marks = [time.process_time()]
        conversation = parse_chat(body).prompt
        assert isinstance(conversation, asked.Conversation)
        marks.append(time.process_time())
        rendered = self._text.template.render(conversation.messages, conversation.tools)
        marks.append(time.process_time())
        prompt = self._prompts.encode(rendered, self._root, (SESSION,))
        marks.append(time.process_time())
        self._serial += 1
        arrived = Request(
            request_id(GatewayId(0), self._serial), MODEL, TENANT, prompt.count, prompt.hashes, 256, session=SESSION
        )
        commands = self._cluster.handle(RequestArrived(arrived), float(self._serial))
        marks.append(time.process_time())
        self._finish(arrived, next(command.node for command in commands if isinstance(command, Assign)))
        times = zip(STAGES, marks, marks[1:], strict=False)
        return {stage: (after - before) * 1e3 for stage, before, after in times}, prompt

    def _finish(self, request: Request, node: NodeId) -> None:
        """Let the node compute the prompt and end the request, outside the measurement."""
        self._sequences[node] += 1
        stored = KvBatch(self._sequences[node], stored=(StoredRun(None, request.hashes),))
        first = FirstToken(request.id, computed_tokens=TURN_TOKENS)
        ended = Ended(request.id, FinishReason.STOP, output_tokens=1, computed_tokens=TURN_TOKENS)
        self._cluster.handle(NodeReported(node, _load(), (first,), (ended,), (stored,)), self._serial + 0.5)


def measure(text: ModelText, context_tokens: int) -> Row:
    """Measure one length of context."""
    conversation = Conversation(text, seed=context_tokens)
    plane = ControlPlane(text)
    system = plane.turn(conversation.body())[1].count
    conversation.grow(context_tokens - system)
    plane.turn(conversation.body())
    warm: list[dict[str, float]] = []
    for _ in range(WARM_TURNS):
        conversation.grow(TURN_TOKENS)
        warm.append(plane.turn(conversation.body())[0])
    colds = [ControlPlane(text).turn(conversation.body()) for _ in range(2)]
    assert colds[0][1] == plane.turn(conversation.body())[1], "an incremental prompt differs from a cold one"
    return Row(context_tokens, _median(warm), _median([times for times, _ in colds]))


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    print(f"{'context':>8} {'':5}" + "".join(f"{stage:>9}" for stage in (*STAGES, "total")) + f"{'cold/warm':>11}")
    for row in rows:
        for kind, times in (("warm", row.warm), ("cold", row.cold)):
            cells = "".join(f"{value:9.2f}" for value in (*times.values(), sum(times.values())))
            print(f"{row.context_tokens:8,} {kind:5}{cells}" + (f"{row.ratio:10.1f}x" if kind == "cold" else ""))
    first, last = (sum(row.warm.values()) for row in (rows[0], rows[-1]))
    print(f"warm turn at {rows[-1].context_tokens:,} tokens over one at {rows[0].context_tokens:,}: {last / first:.2f}x")


def make_text(folder: Path) -> ModelText:
    """Return a model's text side with a freshly trained tokenizer and a template with tools."""
    write_tokenizer(folder, VOCABULARY, 1 << 20)
    write_json(folder / "config.json", {"max_position_embeddings": 1 << 20})
    return ModelText.load(folder, "bench")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = make_text(Path(folder))
        serve_long()  # as a gateway's process does
        rows = [measure(text, context) for context in CONTEXTS]
    show(rows)
    if arguments.json:
        figures = [{**asdict(row), "ratio": row.ratio} for row in rows]
        arguments.json.write_text(json.dumps({"milliseconds": figures}, indent=2) + "\n")


def _median(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(turn[stage] for turn in turns) for stage in STAGES}


def _spec(node: NodeId) -> NodeSpec:
    return NodeSpec(
        id=node,
        model=MODEL,
        pool=PoolName("pool"),
        kind=PoolKind.AGGREGATED,
        incarnation=1,
        blocks=20_000,
        block_tokens=BLOCK_TOKENS,
        block_bytes=1 << 20,
        sequences_max=64,
        step_tokens_max=8192,
        context_tokens_max=1 << 20,
        profile=PROFILE,
    )


def _load() -> Load:
    return Load(blocks_free=20_000)


if __name__ == "__main__":
    main()
