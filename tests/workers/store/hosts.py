"""A host in one process: a store, and nodes with pools of bytes and nothing else, joined over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from orchestrator.core.commands import LoadBlocks, Offer
from orchestrator.core.config import StoreConfig
from orchestrator.core.events import FetchEnded, FetchProgressed, NodeEvent, OfferEnded
from orchestrator.core.types import BlockHash, BlockId, CostProfile, ModelName, NodeId, OfferId, RequestId, StoreId
from tests.builders import TRUST, node_spec
from workers.engines.base import EngineDescription, NotEncodable
from workers.memory import Copier, SharedArena, TransferLimits, host_id
from workers.store.models import ModelBlocks
from workers.store.server import StoreServer
from workers.tiers import Moved, StorePlace, Tiers

MODEL, STORE = ModelName("m"), StoreId("store-0")
BLOCKS, BLOCK_TOKENS, BLOCK_BYTES, SEGMENT = 64, 4, 512, 4
LAYOUT = "plain float32 of tests"
MODELS = (ModelBlocks(MODEL, "weights", LAYOUT, BLOCK_TOKENS, BLOCK_BYTES),)
PAGES = 64
#: A block that no store has.
NOBODYS = BlockHash(bytes(16))
NAMES = tuple(BlockHash(Random(number).randbytes(16)) for number in range(BLOCKS))


def content(number: int) -> bytes:
    """Return the bytes of the block with that number."""
    return Random(1000 + number).randbytes(BLOCK_BYTES)


class PoolEngine:
    """An engine that has a pool and nothing else; `visible` says whether the pool is in host memory."""

    def __init__(self, visible: bool = True, layout: str = LAYOUT) -> None:
        self.description = EngineDescription(
            blocks=BLOCKS,
            block_tokens=BLOCK_TOKENS,
            block_bytes=BLOCK_BYTES,
            stored_bytes=BLOCK_BYTES,
            stored_layout=layout,
            vocabulary=256,
            context_tokens_max=256,
            fingerprint="weights",
            device="cpu",
            computes=True,
        )
        self.arena = SharedArena(BLOCKS * BLOCK_BYTES)
        self.pool = self.arena.view if visible else None
        self.encodable = True
        #: Called before a block is encoded or decoded, where the pool is not visible.
        self.before: Callable[[], None] = lambda: None

    def encode_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        self.before()
        if not self.encodable:
            raise NotEncodable("a NaN")
        for index, block in enumerate(blocks):
            into[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] = self.block(block)

    def decode_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        self.before()
        for index, block in enumerate(blocks):
            self.block(block)[:] = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]

    def block(self, block: int) -> memoryview:
        return self.arena.view[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]

    def fill(self, count: int) -> None:
        """Put the first `count` blocks' content where they are."""
        for number in range(count):
            self.block(number)[:] = content(number)


@dataclass
class Node:
    """A node's end of the store, with a queue where the core would be."""

    name: str
    executor: ThreadPoolExecutor
    engine: PoolEngine = field(default_factory=PoolEngine)
    profile: CostProfile | None = None
    limits: TransferLimits = field(default_factory=TransferLimits)
    moved: list[Moved] = field(default_factory=list)
    events: "asyncio.Queue[NodeEvent]" = field(default_factory=asyncio.Queue)
    serial: int = 0

    def __post_init__(self) -> None:
        spec = node_spec(id=NodeId(self.name), model=MODEL, block_tokens=BLOCK_TOKENS, host=host_id())
        copier = Copier(self.executor, 0)
        put, moved = self.events.put_nowait, self.moved.append
        self.tiers = Tiers(spec, self.engine, self.profile, copier, TRUST, self.limits, put, moved)  # type: ignore[arg-type]

    async def next(self) -> NodeEvent:
        return await asyncio.wait_for(self.events.get(), 10)

    async def attached(self, place: StorePlace) -> None:
        self.tiers.use(place)
        await until(lambda: self.tiers.attached)

    def begin_offer(self, first: int, last: int) -> OfferId:
        self.serial += 1
        offer = OfferId(self.serial)
        parent = NAMES[first - 1] if first else None
        self.tiers.offer(Offer(offer, parent, NAMES[first:last], tuple(BlockId(number) for number in range(first, last))))
        return offer

    async def offer(self, first: int, last: int) -> OfferEnded:
        """Offer blocks; once this returns other nodes find there what was taken of them."""
        self.begin_offer(first, last)
        event = await self.next()
        assert isinstance(event, OfferEnded)
        await self._heard()
        return event

    async def _heard(self) -> None:
        """Wait until the store has heard of the copies that have ended here: what is read after that is answered after that."""
        self.tiers.load(LoadBlocks(RequestId(0), (NOBODYS,), 0, (BlockId(0),), BLOCK_TOKENS))
        assert isinstance(await self.next(), FetchEnded)

    def begin_load(self, first: int, last: int) -> RequestId:
        self.serial += 1
        request = RequestId(self.serial)
        blocks = tuple(BlockId(number) for number in range(first, last))
        self.tiers.load(LoadBlocks(request, NAMES[:last], first, blocks, last * BLOCK_TOKENS))
        return request

    async def load(self, first: int, last: int) -> FetchEnded:
        self.begin_load(first, last)
        while isinstance(event := await self.next(), FetchProgressed):
            pass
        assert isinstance(event, FetchEnded)
        return event

    def holds(self, first: int, last: int) -> bool:
        """Tell whether blocks are what they should be."""
        return all(bytes(self.engine.block(number)) == content(number) for number in range(first, last))


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what other tasks bring about."""
    end = asyncio.get_running_loop().time() + 10
    while not holds():
        assert asyncio.get_running_loop().time() < end, "it does not come about"
        await asyncio.sleep(0.005)


class Host:
    """A store that can be stopped and started, and nodes."""

    def __init__(
        self, cmx: Path | None = None, journal: str = "", models: Sequence[ModelBlocks] = MODELS, **changes: Any
    ) -> None:
        fields = {"cpu_bytes": PAGES * 4096, "segment_blocks": SEGMENT, "detached_s": 0.05, **changes}
        self.config = StoreConfig(cmx=f"file://{cmx}" if cmx is not None else "", **fields)
        self.journal = journal
        self.models = tuple(models)
        self.executor = ThreadPoolExecutor(2)
        self.nodes: list[Node] = []
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1
        self.server = StoreServer(STORE, self.starts, self.config, self.models, TRUST, journal=self.journal)
        self.place = StorePlace(STORE, await self.server.start())

    async def node(self, name: str = "n0", attach: bool = True, **fields: Any) -> Node:
        node = Node(name, self.executor, **fields)
        self.nodes.append(node)
        if attach:
            await node.attached(self.place)
        return node

    async def close(self) -> None:
        for node in self.nodes:
            await node.tiers.close()
        await self.server.stop()
        self.executor.shutdown()


@asynccontextmanager
async def host(
    cmx: Path | None = None, journal: str = "", models: Sequence[ModelBlocks] = MODELS, **changes: Any
) -> AsyncIterator[Host]:
    made = Host(cmx, journal, models, **changes)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


def objects(cmx: Path) -> list[Path]:
    """Return the segments in a folder."""
    return sorted(path for path in (cmx / "v1").rglob("*") if path.is_file())
