"""A process that drafts, but in a thread of this one, and engines that ask it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from orchestrator.core.config import DrafterConfig, EngineConfig, PoolConfig, SpeculationConfig, SpeculationMethod
from orchestrator.core.types import PoolKind
from orchestrator.wire.trust import Trust
from tests.builders import TRUST
from tests.workers.test_eager import CONFIG as FEW_BLOCKS
from workers.engines.base import NetworkPlace
from workers.engines.beat.messages import DraftsOpening
from workers.engines.drafter import Drafter
from workers.engines.drafts.answering import DraftServer
from workers.engines.drafts.asking import PoolDrafter
from workers.engines.drafts.process import open_server
from workers.engines.eager import EagerEngine

#: Seconds that nothing here takes unless it hangs.
LONG_S = 20.0
CONFIG = replace(FEW_BLOCKS, blocks=160)
DRAFTED = replace(CONFIG, speculation=SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_pool="drafts"))


@dataclass
class Drafting:
    """What serves, and where."""

    server: DraftServer
    address: str
    thread: threading.Thread

    @property
    def drafter(self) -> Drafter:
        return self.server._drafter

    def end(self) -> None:
        """Have it end as a process does: connections with it."""
        self.server.close()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()


def drafting_pool(draft: Path, slots: int = 8, context: int = 512, engine: EngineConfig | None = None) -> PoolConfig:
    """Return a pool that drafts by a checkpoint."""
    settings = engine or EngineConfig(device="cpu", dtype="float32", block_tokens=16, threads=1)
    return PoolConfig("drafts", PoolKind.LPX, engine=settings, drafter=DrafterConfig(str(draft), context, slots))


@contextmanager
def drafting(model: Path, draft: Path, slots: int = 8, context: int = 512, trust: Trust = TRUST) -> Iterator[Drafting]:
    """Draft for a model by another one, on loopback."""
    pool = drafting_pool(draft, slots, context)
    server, opened = open_server(DraftsOpening(model, pool, NetworkPlace("127.0.0.1", trust)))

    def serve() -> None:
        with torch.inference_mode():
            server.serve()

    served = Drafting(server, opened.address, threading.Thread(target=serve, daemon=True))
    served.thread.start()
    try:
        yield served
    finally:
        served.end()


def asking(model: Path, trust: Trust = TRUST) -> EagerEngine:
    """Return an engine that a pool drafts for, once it is told where."""
    return EagerEngine(model, DRAFTED, 8, 512, trust=trust)


def reach(engine: EagerEngine, address: str) -> PoolDrafter:
    """Have an engine ask the process there, and wait until it can; it waits for answers as long as they take."""
    drafts = engine.drafts
    assert drafts is not None
    drafts.use(address)
    assert drafts.reaches(LONG_S), f"{address} was not reached"
    patient(drafts)
    return drafts


def patient(drafts: PoolDrafter) -> None:
    """Have an engine wait as long as an answer may take here, however short its steps are."""
    drafts._steps.clear()
    drafts._steps.append(LONG_S)
    drafts.stepped = lambda seconds: None
