"""Drives nodes in fake time: engines that compute nothing, links that copy blocks from node to node, a store, timers in one heap.

`CountingEngine` only counts, for measurements. `CheckingEngine` keeps for every position of every block what its KV would be
computed from, so that a step that reads a block somebody else overwrote, or a fetch that brought the wrong one, is noticed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from orchestrator.core.commands import (
    ClearTimer,
    Fetch,
    Forget,
    LoadBlocks,
    NodeCommand,
    Offer,
    PublishKv,
    ReportEnded,
    ReportFirstToken,
    ReportPrefetchEnded,
    RunStep,
    SendBlocks,
    SetTimer,
    Slice,
    StopFetch,
    StopOffer,
    TellLeases,
)
from orchestrator.core.cost.costs import step_seconds
from orchestrator.core.events import (
    Assigned,
    BlocksSent,
    Ended,
    ExportClosed,
    ExportOpened,
    FetchEnded,
    FetchProgressed,
    FirstToken,
    NodeEvent,
    OfferEnded,
    PrefetchEnded,
    SliceResult,
    StepFailed,
    StepFinished,
    TimerFired,
)
from orchestrator.core.node.node import Node
from orchestrator.core.timers import NodeTimer
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    BlockId,
    ExportId,
    KvBatch,
    NodeId,
    NodeSpec,
    OfferId,
    RequestId,
)

PRIME = (1 << 127) - 1


def extended(chain: int, token: int) -> int:
    """Return what stands for a sequence of tokens after one more."""
    return (chain * 1_000_003 + token + 1) % PRIME


def block_hashes(tokens: list[int], block_tokens: int) -> tuple[BlockHash, ...]:
    """Return the names of the full blocks of a prompt."""
    hashes: list[BlockHash] = []
    chain = 0
    for index, token in enumerate(tokens, start=1):
        chain = extended(chain, token)
        if index % block_tokens == 0:
            hashes.append(BlockHash(chain.to_bytes(16, "big")))
    return tuple(hashes)


class EngineBroken(Exception):
    """An engine could not run a step."""


class CountingEngine:
    """Answers steps; a request stops after the tokens given in `stops`, or goes on until its node ends it."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.stops: dict[RequestId, int] = {}
        self.outputs: dict[RequestId, int] = {}
        self.named: dict[RequestId, int] = {}

    def add(self, assignment: Assignment) -> None:
        self.outputs[assignment.request] = 0
        self.named[assignment.request] = len(assignment.hashes)

    def forget(self, request: RequestId) -> None:
        self.outputs.pop(request, None)
        self.named.pop(request, None)

    def step(self, slices: tuple[Slice, ...]) -> tuple[SliceResult, ...]:
        return tuple(self.compute(part) for part in slices)

    def compute(self, part: Slice) -> SliceResult:
        request, size = part.request, self.spec.block_tokens
        hashes: tuple[BlockHash, ...] = ()
        brought = self.brought(part)
        while (self.named[request] + 1) * size <= part.start + part.count + max(0, brought - 1):
            hashes += (self.name(request, self.named[request]),)
            self.named[request] += 1
        if not part.sample:
            return SliceResult(request)
        self.outputs[request] += brought
        stopped = self.outputs[request] == self.stops.get(request)
        drafting_s = 0.0001 * part.model_draft_max if self.is_modelled(part) else None
        return SliceResult(request, brought, hashes, stopped=stopped, drafted_tokens=self.drafted(part), drafting_s=drafting_s)

    def brought(self, part: Slice) -> int:
        """Return how many tokens a slice brings: as many of its drafts as their number and place happen to say."""
        done = self.outputs[part.request]
        accepted = (part.request + 7 * done) % (self.drafted(part) + 1)
        return part.sample * min(1 + accepted, self.stops.get(part.request, done + 1 + accepted) - done)

    @staticmethod
    def is_modelled(part: Slice) -> bool:
        """Return whether a model drafts, as nothing is found: now and then, as the place happens to say."""
        return part.model_draft_max > 0 and (part.draft_max == 0 or part.start % 3 > 0)

    def drafted(self, part: Slice) -> int:
        """Return how many tokens are drafted; none while a draft model still reads."""
        return part.model_draft_max * (part.start % 5 > 0) if self.is_modelled(part) else part.draft_max

    def name(self, request: RequestId, index: int) -> BlockHash:
        return BlockHash(b"%08x%08x" % (request % (1 << 32), index))

    def copy_in(self, blocks: tuple[BlockId, ...], source: "CountingEngine", sent: tuple[BlockId, ...]) -> None:
        """Nothing is kept, so nothing is copied."""

    def read(self, block: BlockId, name: BlockHash) -> list[int | None]:
        """Return the content of a block that is said to have a name."""
        return []

    def write(self, block: BlockId, content: list[int | None]) -> None:
        """Nothing is kept."""


class CheckingEngine(CountingEngine):
    """Checks that all KV a slice builds on is in its table; generates what depends on the tokens before only."""

    def __init__(self, spec: NodeSpec, prompts: dict[RequestId, list[int]]) -> None:
        super().__init__(spec)
        self.prompts = prompts
        self.memory: list[list[int | None]] = [[None] * spec.block_tokens for _ in range(spec.blocks)]
        self.tables: dict[RequestId, list[BlockId]] = {}
        #: What stands for each prefix of prompt and output.
        self.chains: dict[RequestId, list[int]] = {}

    def add(self, assignment: Assignment) -> None:
        super().add(assignment)
        self.tables[assignment.request] = []
        chains = self.chains[assignment.request] = []
        for token in self.prompts[assignment.request]:
            chains.append(extended(chains[-1] if chains else 0, token))

    def forget(self, request: RequestId) -> None:
        super().forget(request)
        self.tables.pop(request, None)
        self.chains.pop(request, None)

    def compute(self, part: Slice) -> SliceResult:
        table, chains, size = self.tables[part.request], self.chains[part.request], self.spec.block_tokens
        assert part.first_block <= len(table), f"{part} leaves a hole after {len(table)} blocks"
        del table[part.first_block if part.blocks else len(table) :]
        table += part.blocks
        assert part.start + part.count <= len(chains), f"{part}: {len(chains)} tokens"
        end = part.start + part.count + part.draft_max
        assert end <= len(table) * size, f"{part}: {len(table)} blocks"
        for position in range(part.start):
            found = self.memory[table[position // size]][position % size]
            assert found == chains[position], f"{part}: block {table[position // size]} has other KV at {position}"
        for _ in range(self.brought(part)):
            chains.append(extended(chains[-1], chains[-1] % 97))
        complete = part.start + part.count + max(0, self.brought(part) - 1)
        for position in range(part.start, end):  # a rejected draft leaves something that nobody may build on
            self.memory[table[position // size]][position % size] = chains[position] if position < complete else -1
        return super().compute(part)

    def name(self, request: RequestId, index: int) -> BlockHash:
        return BlockHash(self.chains[request][(index + 1) * self.spec.block_tokens - 1].to_bytes(16, "big"))

    def copy_in(self, blocks: tuple[BlockId, ...], source: CountingEngine, sent: tuple[BlockId, ...]) -> None:
        assert isinstance(source, CheckingEngine)
        for target, origin in zip(blocks, sent, strict=True):
            self.memory[target] = list(source.memory[origin])

    def read(self, block: BlockId, name: BlockHash) -> list[int | None]:
        content = list(self.memory[block])
        last = content[-1]
        assert (last or 0).to_bytes(16, "big") == name, f"block {block} does not hold {name!r}"
        return content

    def write(self, block: BlockId, content: list[int | None]) -> None:
        self.memory[block] = list(content)


class Belief:
    """What a gateway believes of one node; checks that every batch keeps it closed under prefix and without gaps."""

    def __init__(self) -> None:
        self.sequence = 0
        self.parents: dict[BlockHash, BlockHash | None] = {}
        #: True until a snapshot comes, after all was forgotten.
        self.lost = False

    def lose(self) -> None:
        """Forget all."""
        self.parents, self.lost = {}, True

    def apply(self, batch: KvBatch) -> None:
        if batch.cleared:
            self.parents, self.lost = {}, False
        elif self.lost:
            return
        else:
            assert batch.sequence == self.sequence + 1, f"batch {batch.sequence} after {self.sequence}"
        self.sequence = batch.sequence
        for name in batch.removed:
            del self.parents[name]
        for run in batch.stored:
            parent = run.parent
            for name in run.hashes:
                assert name not in self.parents, f"{name!r} is stored twice"
                assert parent is None or parent in self.parents, f"{name!r} before its parent {parent!r}"
                self.parents[name] = parent
                parent = name
        orphans = [name for name, parent in self.parents.items() if parent is not None and parent not in self.parents]
        assert orphans == []


@dataclass(slots=True)
class Transfer:
    """A fetch that runs: who reads what from whom, and how far it is."""

    export: ExportId
    reader: NodeId
    source: NodeId
    fetch: Fetch
    #: Blocks that have arrived, prompt tokens that are complete with them.
    arrived: int = 0
    tokens: int = 0


class NodeDriver:
    """Nodes wired to each other; whatever they ask for happens in fake time, in one order."""

    def __init__(self, engines: dict[NodeId, CountingEngine], nodes: dict[NodeId, Node], after: Callable[[Node], None]) -> None:
        self.engines = engines
        self.nodes = nodes
        #: Called after every event with the node that took it.
        self.after = after
        self.now = 0.0
        self.events = 0
        self.ended: list[tuple[NodeId, Ended]] = []
        self.prefetches_ended: list[tuple[NodeId, PrefetchEnded]] = []
        self.first_tokens: list[tuple[NodeId, FirstToken]] = []
        self.beliefs = {node: Belief() for node in nodes}
        #: Seconds from a frame's sending to its arrival.
        self.latency_s = 0.001
        self.transfers: dict[ExportId, Transfer] = {}
        #: What the store of all nodes holds, seconds it takes for a block, and those for one that it gives back.
        self.store: dict[BlockHash, list[int | None]] = {}
        self.copy_s = 0.0005
        self.load_s = 0.0005
        self.offers: dict[tuple[NodeId, OfferId], Offer] = {}
        #: Loads that run, and the prompt tokens that are present with what each has brought.
        self.loads: dict[tuple[NodeId, RequestId], int] = {}
        self.loaded_blocks = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = count()
        self._exports = count(1)
        self._timers: dict[tuple[NodeId, NodeTimer], int] = {}

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something after a while; appointments for one moment are kept in the order they were made."""
        heappush(self._heap, (self.now + delay_s, next(self._serials), action))

    def run(self) -> None:
        """Go on until nothing is left to happen."""
        while self._heap:
            self.now, _, action = heappop(self._heap)
            action()

    def assign(self, node: NodeId, assignment: Assignment) -> None:
        """Hand a request to a node, and its prompt to the engine, as a node's server does."""
        if assignment.request not in self.engines[node].outputs:
            self.engines[node].add(assignment)
        self.tell(node, Assigned(assignment))

    def tell(self, node: NodeId, event: NodeEvent) -> None:
        """Give a node an event now and do what it asks for."""
        self.events += 1
        commands = self.nodes[node].handle(event, self.now)
        self.after(self.nodes[node])
        for command in commands:
            self.execute(node, command)

    def break_fetch(self, export: ExportId) -> None:
        """Let the link of a running fetch fail."""
        transfer = self.transfers.pop(export, None)
        if transfer is not None:
            request = transfer.fetch.request
            self._tell_later(transfer.reader, FetchEnded(request, transfer.tokens, failure="link broken"))
            self._tell_later(transfer.source, ExportClosed(export))

    def break_load(self, node: NodeId, request: RequestId) -> None:
        """End a load before it has brought all."""
        if (node, request) in self.loads:
            self._end_load(node, request, self.loads[node, request], "stopped")

    def break_offer(self, node: NodeId, offer: OfferId) -> None:
        """End an offer before it is copied."""
        if self.offers.pop((node, offer), None) is not None:
            self._tell_later(node, OfferEnded(offer, "stopped"))

    def _copy(self, node: NodeId, offer: Offer) -> None:
        """Let the store copy all of an offer, unless it has forgotten what comes before."""
        if self.offers.pop((node, offer.offer), None) is None:
            return
        if offer.parent is not None and offer.parent not in self.store:
            self.tell(node, OfferEnded(offer.offer, "what comes before is not here"))
            return
        for name, block in zip(offer.hashes, offer.blocks, strict=True):
            self.store[name] = self.engines[node].read(block, name)
        self.tell(node, OfferEnded(offer.offer))

    def _load(self, node: NodeId, load: LoadBlocks) -> None:
        """Bring one more block of a load, or end it with the last one, or with the first that the store lacks."""
        if (node, load.request) not in self.loads:
            return
        size = self.nodes[node].spec.block_tokens
        place = self.loads[node, load.request] // size
        if place * size >= load.tokens or load.hashes[place] not in self.store:
            failure = None if place * size >= load.tokens else "the store has no more"
            self._end_load(node, load.request, place * size, failure)
            return
        self.engines[node].write(load.blocks[place - load.first_block], self.store[load.hashes[place]])
        self.loaded_blocks += 1
        self.loads[node, load.request] += size
        self.tell(node, FetchProgressed(load.request, (place + 1) * size))
        self.later(self.load_s, lambda: self._load(node, load))

    def _end_load(self, node: NodeId, request: RequestId, tokens: int, failure: str | None) -> None:
        del self.loads[node, request]
        self._tell_later(node, FetchEnded(request, tokens, failure=failure))

    def _tell_later(self, node: NodeId, event: NodeEvent) -> None:
        self.later(self.latency_s, lambda: self.tell(node, event))

    def execute(self, node: NodeId, command: NodeCommand) -> None:
        """Do what a node asks for, or make an appointment for it."""
        match command:
            case RunStep():
                self._run_step(node, command)
            case Fetch():
                self._open(node, command)
            case StopFetch():
                for export in [key for key, item in self.transfers.items() if self._reads(item, node, command.request)]:
                    self.break_fetch(export)
                self.break_load(node, command.request)
            case LoadBlocks():
                self.loads[node, command.request] = command.first_block * self.nodes[node].spec.block_tokens
                self.later(self.latency_s, lambda: self._load(node, command))
            case Offer():
                self.offers[node, command.offer] = command
                self.later(self.latency_s + self.copy_s * len(command.blocks), lambda: self._copy(node, command))
            case StopOffer():
                self.break_offer(node, command.offer)
            case SendBlocks():
                self.later(self.latency_s, lambda: self._deliver(command))
            case Forget():
                self.engines[node].forget(command.request)
            case ReportFirstToken():
                self.first_tokens.append((node, command.report))
            case ReportEnded():
                self.ended.append((node, command.report))
            case ReportPrefetchEnded():
                self.prefetches_ended.append((node, command.report))
            case PublishKv():
                for batch in command.batches:
                    self.beliefs[node].apply(batch)
            case TellLeases():
                pass  # no gateway is here
            case SetTimer():
                self._set_timer(node, command)
            case ClearTimer():
                self._timers.pop((node, command.key), None)

    def _run_step(self, node: NodeId, command: RunStep) -> None:
        """Compute at once; the results come when the profile says."""
        try:
            results = self.engines[node].step(command.slices)
        except EngineBroken as error:
            self._tell_later(node, StepFailed(command.step, str(error)))
            return
        prefills = [(part.count, part.start) for part in command.slices if part.count > 1]
        prefills += [(part.draft_max, part.start + 1) for part in command.slices if part.draft_max]
        decodes = [part.start for part in command.slices if part.count == 1]
        seconds = step_seconds(self.nodes[node].spec.profile, prefills, len(decodes), sum(decodes))
        self.later(seconds, lambda: self.tell(node, StepFinished(command.step, results, seconds)))

    def _set_timer(self, node: NodeId, command: SetTimer[NodeTimer]) -> None:
        """Set a timer; the number tells an earlier setting of the same key from this one."""
        number = next(self._serials)
        self._timers[node, command.key] = number
        self.later(command.at - self.now, lambda: self._fire(node, command.key, number))

    def _fire(self, node: NodeId, key: NodeTimer, number: int) -> None:
        if self._timers.get((node, key)) == number:
            del self._timers[node, key]
            self.tell(node, TimerFired(key))

    def _open(self, node: NodeId, fetch: Fetch) -> None:
        export = ExportId(next(self._exports))
        self.transfers[export] = Transfer(export, node, fetch.source, fetch)
        opened = ExportOpened(export, fetch.request, fetch.hashes, fetch.first_block, fetch.tokens, fetch.pending)
        self._tell_later(fetch.source, opened)

    @staticmethod
    def _reads(transfer: Transfer, node: NodeId, request: RequestId) -> bool:
        return transfer.reader == node and transfer.fetch.request == request

    def _deliver(self, command: SendBlocks) -> None:
        """Copy blocks over a link that is still up, and tell both ends."""
        transfer = self.transfers.get(command.export)
        if transfer is None:
            return
        first, end = transfer.arrived, transfer.arrived + len(command.blocks)
        reader, source = self.engines[transfer.reader], self.engines[transfer.source]
        reader.copy_in(transfer.fetch.blocks[first:end], source, command.blocks)
        transfer.arrived, transfer.tokens = end, command.tokens
        self.tell(transfer.source, BlocksSent(command.export, command.blocks))
        request = transfer.fetch.request
        if not command.final:
            self.tell(transfer.reader, FetchProgressed(request, command.tokens))
            return
        del self.transfers[command.export]
        self._tell_later(transfer.source, ExportClosed(command.export))
        self.tell(transfer.reader, FetchEnded(request, command.tokens, command.computed_tokens))
