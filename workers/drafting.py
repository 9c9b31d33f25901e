"""A process that drafts as its actor has it: opened from a cluster file, watched until it ends."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from orchestrator.core.config import PoolConfig
from workers.engines.base import EngineLost, NetworkPlace
from workers.engines.beat.child import Child
from workers.engines.beat.messages import DraftsOpened, DraftsOpening
from workers.engines.drafts.links import Link

log = logging.getLogger("weft.drafts")

#: Seconds that the process gets to load the draft model.
OPEN_S_MAX = 600.0
#: Seconds between two looks at whether it answers.
LOOK_EVERY_S = 1.0


class DraftProcessServer:
    """Drafts for a pool's nodes, in a process that does nothing else."""

    def __init__(
        self, pool: PoolConfig, model_dir: Path, place: NetworkPlace, hung_s: float, fatal: Callable[[BaseException], None]
    ) -> None:
        """Start the process and have it load the draft model; `fatal` is told, by a thread, when it ends or hangs.

        Args:
            pool: one that drafts.
            model_dir: the checkpoint of the model whose nodes it drafts for.
            place: where it listens, and whom it believes.
            hung_s: seconds that it may not answer before it is ended.
            fatal: told of the end.

        Raises:
            ConfigError: for a draft model of another vocabulary, and for what cannot be had: memory, cores, priority, device.
            EngineLost: if the process ends or hangs.
            RuntimeError: for a checkpoint that cannot be computed.
        """
        self._child = Child("workers.engines.drafts.process", f"the process that drafts for pool {pool.name}")
        try:
            self._child.send(DraftsOpening(model_dir, pool, place))
            opened = self._child.opened(OPEN_S_MAX)
        except BaseException:
            self._child.end()
            raise
        assert isinstance(opened, DraftsOpened), f"{opened!r} instead of a draft model"
        #: Where nodes connect.
        self.address = opened.address
        self._link = Link(self.address, place.trust)
        self._hung_s = hung_s
        self._fatal = fatal
        self._closed = False
        log.info("pool %s drafts at %s, a pass takes %.6f s", pool.name, self.address, opened.pass_s)
        threading.Thread(target=self._watch, name="drafting", daemon=True).start()

    def close(self) -> None:
        """End the process."""
        self._closed = True
        self._child.end()

    def _watch(self) -> None:
        """Ask it, as nodes do, again and again."""
        try:
            while True:
                self._link.check(self._hung_s)
                self._link.rest(LOOK_EVERY_S)
        except (OSError, EngineLost) as error:
            self._link.close()
            if not self._closed:
                self._child.end()
                self._fatal(EngineLost(f"the process at {self.address} drafts no more: {error}"))
