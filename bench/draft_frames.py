"""A process that drafts, at which hostile questions are thrown. See `frames.py`."""

import asyncio
import random
from array import array
from pathlib import Path

import torch

from bench.frames import ANSWER_S_MAX, TRUST
from bench.lane_frames import ConnectionVictim
from orchestrator.core.config import DRAFT_TOKENS_MAX, DrafterConfig, EngineConfig, PoolConfig
from orchestrator.core.types import PoolKind
from orchestrator.wire.trust import Caller
from workers.engines.base import NetworkPlace
from workers.engines.beat.messages import DraftsOpening
from workers.engines.drafts.links import Link
from workers.engines.drafts.messages import SAID, Ask, DraftsLost, Told, packed
from workers.engines.drafts.process import open_server
from workers.engines.shape import read_architecture

SLOTS = 4


class DraftVictim(ConnectionVictim):
    """A process that drafts, thrown at by a node that it has greeted; its draft model is the model itself."""

    what = "questions of a node to a process that drafts"
    caller = Caller.DRAFTED

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self._said = SAID
        self._vocabulary = read_architecture(model).vocabulary

    async def _start(self) -> None:
        engine = EngineConfig(device="cpu", dtype="float32", block_tokens=16, threads=1)
        drafter = DrafterConfig(str(self._model), context_tokens_max=128, sequences_max=SLOTS)
        pool = PoolConfig("drafts", PoolKind.LPX, engine=engine, drafter=drafter)
        opening = DraftsOpening(self._model, pool, NetworkPlace("127.0.0.1", TRUST))
        self._server, opened = await asyncio.to_thread(open_server, opening)
        self._begin(opened.address, torch.inference_mode()(self._server.serve))

    async def _stop(self) -> None:
        self._server.close()
        await asyncio.to_thread(self._thread.join, ANSWER_S_MAX)

    def _make(self, source: random.Random) -> bytes:
        return packed(Ask([self._told(source) for _ in range(source.choice((0, 1, 2, SLOTS + 1)))], [source.randrange(9)]))

    def _told(self, source: random.Random) -> Told:
        tokens = array("I", [source.randrange(self._vocabulary) for _ in range(source.choice((0, 1, 20, 200)))])
        if source.random() < 0.1:
            tokens.append(source.choice((self._vocabulary, (1 << 32) - 1)))
        most = source.choice((1, 3, DRAFT_TOKENS_MAX, DRAFT_TOKENS_MAX + 1))
        return Told(source.randrange(9), tokens.tobytes(), most, source.random() < 0.7)

    def _works(self) -> bool:
        """Have it draft for a text, once it is read."""
        try:
            link = Link(self._address, TRUST)
            link.send(Ask([Told(1, array("I", range(1, 9)).tobytes(), 3, begins=True)], []))
            answer = link.answer(ANSWER_S_MAX)
            link.close()
        except (OSError, ValueError, DraftsLost):
            return False
        return answer is not None and [len(drafts or b"") for drafts in answer.drafts] == [3 * array("I").itemsize]
