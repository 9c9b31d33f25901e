"""The ends of a store's wires that hostile frames are thrown at: by a node of its host, and by a gateway. See `frames.py`."""

import os
import random
import tempfile
from typing import Any

from bench.frames import TRUST, NodeVictim, comes
from orchestrator.core.config import StoreConfig
from orchestrator.core.types import ModelName, StoreId
from orchestrator.wire import store_pb2
from orchestrator.wire.trust import Caller
from workers.memory import host_id
from workers.store.models import ModelBlocks
from workers.store.server import StoreServer

STORE, MODEL = StoreId("store-0"), ModelName("m")
BLOCK_TOKENS, BLOCK_BYTES, SEGMENT = 16, 64, 4
BLOCKS = ModelBlocks(MODEL, "weights", "plain", BLOCK_TOKENS, BLOCK_BYTES)
#: Blocks that everybody speaks of, so that what is thrown is about each other.
NAMES = random.Random(1).randbytes(16 * 32)


def _chain(source: random.Random) -> tuple[bytes, bytes]:
    """Return a parent, and the hashes behind it."""
    first = source.choice((0, 0, 4, 9))
    return NAMES[16 * (first - 1) : 16 * first] if first else b"", NAMES[16 * first : 16 * (first + source.choice((1, 4, 9)))]


def _from_node(source: random.Random) -> bytes:
    parent, hashes = _chain(source)
    number = source.randrange(9)
    frame = store_pb2.AttachFrame()
    match source.randrange(5):
        case 0:
            frame.offers.add(offer=source.randrange(1 << 30), parent=parent, hashes=hashes)
        case 1:
            frame.written.add(offer=number, blocks=source.choice((0, 1, 4)))
        case 2:
            first = source.choice((0, 1))
            tokens = source.choice((BLOCK_TOKENS * 2, BLOCK_TOKENS * 4))
            background = source.random() < 0.3
            read = source.randrange(1 << 30)
            direct, hashes = source.random() < 0.5, NAMES[: 16 * 4]
            frame.reads.add(
                read=read, hashes=hashes, first_block=first, tokens=tokens, background=background, direct=direct
            )  # fmt: skip
        case 3:
            failure = source.choice(("", "", "missing", "corrupt", "late", "nothing"))
            frame.copied.add(read=number, answers=source.choice((0, 1)), failure=failure)
        case _:
            frame.closed.append(number)
    return frame.SerializeToString()


def _from_gateway(source: random.Random) -> bytes:
    _, hashes = _chain(source)
    blocks = len(hashes) // 16
    frame = store_pb2.ToStore(frames_received=source.randrange(100))
    match source.randrange(5):
        case 0:
            frame.resyncs.add(model=MODEL, after=source.choice((None, 0, 5)))
        case 1:
            frame.leases.add(
                id=str(source.randrange(50)), tenant="t", model=MODEL, hashes=NAMES[: 16 * 8], tier=source.choice(("cpu", "cmx")),
                ttl_s=source.choice((0.01, 60.0)), size_bytes=100, revision=source.randrange(3),
            )  # fmt: skip
        case 2:
            frame.ended_leases.add(id=str(source.randrange(50)), revision=source.randrange(3))
        case 3:
            frame.prefetches.add(model=MODEL, hashes=hashes, blocks=blocks)
        case _:
            tier, demote = source.choice(("cpu", "cmx")), source.random() < 0.5
            frame.evictions.add(model=MODEL, hashes=hashes, first_block=0, end_block=blocks, tier=tier, demote=demote)
    return frame.SerializeToString()


def _hello(node: str) -> store_pb2.AttachFrame:
    return store_pb2.AttachFrame(
        hello=store_pb2.NodeHello(
            node=node, model=MODEL, fingerprint=BLOCKS.fingerprint, layout=BLOCKS.layout, block_tokens=BLOCK_TOKENS,
            block_bytes=BLOCK_BYTES, process=os.getpid(), host=host_id(),
        )
    )  # fmt: skip


class StoreVictim(NodeVictim):
    """A store, thrown at by a node of its host."""

    good = (_from_node,)
    what = "frames of a node to a store"
    _method = "/weft.store.v1.Store/Attach"
    _metadata = TRUST.metadata(Caller.ATTACHED, STORE)
    _serves, _opening = "serve_node", 1

    async def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        config = StoreConfig(cpu_bytes=1 << 16, cmx=f"file://{self._folder.name}", segment_blocks=SEGMENT, detached_s=0.01)
        self._store = StoreServer(STORE, 1, config, [BLOCKS], TRUST)
        self._channel = TRUST.open_channel(await self._store.start())
        driver = self._store.driver
        serve = getattr(driver, self._serves)
        setattr(driver, self._serves, lambda stream: serve(self._counted(stream)))

    async def _stop(self) -> None:
        await self._channel.close(None)
        await self._store.stop()
        self._folder.cleanup()

    async def _open(self, call: Any) -> None:
        await call.write(_hello("n0").SerializeToString())

    async def works(self) -> bool:
        """Tell whether a node is still given slots for what it offers."""
        call = self._call("/weft.store.v1.Store/Attach", TRUST.metadata(Caller.ATTACHED, STORE))
        await call.write(_hello("n1").SerializeToString())
        offer = store_pb2.Offer(offer=1, hashes=random.Random(2).randbytes(16))
        await call.write(store_pb2.AttachFrame(offers=[offer]).SerializeToString())
        return await comes(call, lambda data: any(grant.slots for grant in store_pb2.ArenaFrame.FromString(data).grants))


class AdvisedVictim(StoreVictim):
    """A store, thrown at by a gateway."""

    good = (_from_gateway,)
    what = "frames of a gateway to a store"
    _method = "/weft.store.v1.Store/Connect"
    _metadata = TRUST.metadata(Caller.STORE_GATEWAY, STORE)
    _serves = "serve_gateway"

    async def _open(self, call: Any) -> None:
        await call.write(store_pb2.ToStore(hello=store_pb2.GatewayHello(gateway=1)).SerializeToString())
