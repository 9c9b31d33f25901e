"""An FFN rank as its actor has it: opened from a cluster file, served by a thread or a process; and what moves its experts."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.core.config import PoolConfig
from orchestrator.core.experts import ExpertBalancer, Placement
from orchestrator.core.types import PoolKind
from workers.engines.base import NetworkPlace
from workers.engines.beat.child import Child, check_device
from workers.engines.beat.messages import RankOpened, RankOpening
from workers.engines.shape import read_architecture
from workers.engines.split.places import first_placements, slots_of

#: Seconds that a process gets to load a rank's weights.
OPEN_S_MAX = 600.0


class FfnServer:
    """Serves one FFN rank of a group, in a thread: other threads load what its experts move to."""

    def __init__(
        self,
        pool: PoolConfig,
        model_dir: Path,
        rank: int,
        fatal: Callable[[BaseException], None],
        network: NetworkPlace | None = None,
    ) -> None:
        """Load the rank's part of the model; `fatal` is told, by a thread, of an error that ends it."""
        split = pool.split
        assert split is not None, f"pool {pool.name} has no FFN ranks"
        engine = pool.engine
        from workers.engines.split.rank import FfnRank  # noqa: PLC0415

        self._rank = FfnRank(
            model_dir, engine.dtype, engine.device, rank, split.ffn, split.spare_slots, split.threads, engine.weights, network
        )
        self._fatal = fatal
        threading.Thread(target=self._run, name=f"ffn-{rank}", daemon=True).start()

    @property
    def address(self) -> str:
        """Where attention ranks of this host connect."""
        return self._rank.address

    @property
    def network_address(self) -> str | None:
        """Where those of other hosts do; None if they may not."""
        return self._rank.network_address

    def prepare(self, layer: int, version: int, placement: Placement) -> None:
        """Load what another placement has here."""
        self._rank.prepare(layer, version, placement)

    def _run(self) -> None:
        try:
            self._rank.serve()
        except BaseException as error:
            self._fatal(error)
            raise


class BeatFfnServer:
    """Serves one FFN rank of a group that keeps a beat, in a process that does nothing else: its experts stay where they are."""

    def __init__(
        self,
        pool: PoolConfig,
        model_dir: Path,
        rank: int,
        fatal: Callable[[BaseException], None],
        network: NetworkPlace | None = None,
    ) -> None:
        """Start the process and have it load the rank's part of the model; `fatal` is told, by a thread, when it ends.

        Raises:
            ConfigError: for another device, and for cores and priorities that cannot be had.
            EngineLost: if the process ends or hangs.
            RuntimeError: for a checkpoint that cannot be computed.
        """
        check_device(pool)
        self._child = Child("workers.engines.beat.rank", f"the process of FFN rank {rank}")
        try:
            self._child.send(RankOpening(model_dir, pool, rank, network))
            opened = self._child.opened(OPEN_S_MAX)
        except BaseException:
            self._child.end()
            raise
        assert isinstance(opened, RankOpened), f"{opened!r} instead of a rank"
        self.address, self.network_address = opened.address, opened.network_address
        threading.Thread(target=lambda: fatal(self._child.await_end()), name=f"ffn-{rank}", daemon=True).start()


def open_rank(
    pool: PoolConfig,
    model_dir: Path,
    rank: int,
    fatal: Callable[[BaseException], None],
    network: NetworkPlace | None = None,
) -> FfnServer | BeatFfnServer:
    """Return an FFN rank of a pool that serves, attention ranks of other hosts as well if it has a place for them."""
    serves = BeatFfnServer if pool.kind is PoolKind.LPX else FfnServer
    return serves(pool, model_dir, rank, fatal, network)


def added_up(picks: Sequence[list[list[int]]]) -> list[list[int]]:
    """Return how often each expert of each layer was picked by any of some attention ranks."""
    return [[sum(counts) for counts in zip(*layers, strict=True)] for layers in zip(*picks, strict=True)]


def balancer_of(pool: PoolConfig, model_dir: Path) -> ExpertBalancer | None:
    """Return what decides where a group's experts move; None for a model without experts, and where they keep a beat."""
    shape, split = read_architecture(model_dir), pool.split
    if shape.experts is None or split is None or pool.kind is PoolKind.LPX:
        return None
    slots = slots_of(shape.experts.count, split.ffn, split.spare_slots)
    return ExpertBalancer(first_placements(shape, split.ffn, split.spare_slots), slots, split.imbalance_max)
