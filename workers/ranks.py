"""An FFN rank as a process has it: opened from a cluster file, serving in a thread, and what decides when its experts move."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.core.config import PoolConfig
from orchestrator.core.experts import ExpertBalancer, Placement
from orchestrator.wire.trust import Trust
from workers.engines.shape import read_architecture
from workers.engines.split.places import first_placements, slots_of


class FfnServer:
    """Serves one FFN rank of a group."""

    def __init__(
        self,
        pool: PoolConfig,
        model_dir: Path,
        rank: int,
        fatal: Callable[[BaseException], None],
        network: tuple[str, Trust] | None = None,
    ) -> None:
        """Load the rank's part of the model.

        `fatal` is told, by the serving thread, of an error that ends it. `network` is where, and from whom, it takes connections
        of attention ranks on other hosts.
        """
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


def added_up(picks: Sequence[list[list[int]]]) -> list[list[int]]:
    """Return how often each expert of each layer was picked by any of some attention ranks."""
    return [[sum(counts) for counts in zip(*layers, strict=True)] for layers in zip(*picks, strict=True)]


def balancer_of(pool: PoolConfig, model_dir: Path) -> ExpertBalancer | None:
    """Return what decides where a group's experts move; None for a model without experts."""
    shape, split = read_architecture(model_dir), pool.split
    if shape.experts is None or split is None:
        return None
    slots = slots_of(shape.experts.count, split.ffn, split.spare_slots)
    return ExpertBalancer(first_placements(shape, split.ffn, split.spare_slots), slots, split.imbalance_max)
