"""An FFN rank: its part of every layer's FFN, computed for whatever attention rank of the group sends rows.

It owns no KV, knows no requests and keeps no step: ranks that have nothing to do send nothing, and nobody waits for them. Of a
dense FFN it has a share of the inner width, of an expert layer some of the experts (`core/experts.py`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.core.config import WeightFormat
from orchestrator.core.experts import Placement
from workers.engines.base import NetworkPlace
from workers.engines.device import device_of, dtype_of
from workers.engines.experts import ExpertBank
from workers.engines.inlet import Inlet
from workers.engines.loader import Loader, Share
from workers.engines.mlp import GatedMlp
from workers.engines.shape import read_architecture
from workers.engines.split.lanes import Header, Lane, RankLost, layout_for
from workers.engines.split.network import network_door
from workers.engines.split.places import first_placements
from workers.engines.split.shared import shared_door
from workers.engines.weights import Weights

#: Placements of a layer that a rank has at most: the one in use and, while ranks change over, the one before.
VERSIONS_MAX = 2


@dataclass(slots=True)
class _Part:
    """What a rank has of one layer."""

    prefix: str
    gain: Tensor | None
    dense: GatedMlp | None
    #: By version of the placement.
    banks: dict[int, ExpertBank | None]


class FfnRank:
    """One FFN rank of a group."""

    def __init__(
        self,
        model_dir: Path,
        dtype: str,
        device: str,
        rank: int,
        ranks: int,
        spare_slots: int,
        threads: int = 0,
        weights: WeightFormat = WeightFormat.AUTO,
        network: NetworkPlace | None = None,
    ) -> None:
        """Load the rank's part of a checkpoint.

        Args:
            model_dir: the checkpoint.
            dtype: auto, float32 or bfloat16: the same as the attention ranks'.
            device: auto, cpu, cuda or cuda:N.
            rank: which of the `ranks` this is.
            spare_slots: slots for copies of experts.
            threads: CPU threads; 0: as torch has them.
            weights: what linear weights are rounded to.
            network: where attention ranks of other hosts may connect; None: there are none.

        Raises:
            CheckpointError, ConfigError: as `EagerEngine` does.
            OSError: if it cannot listen there.
        """
        self._shape = shape = read_architecture(model_dir)
        self._device, self._dtype = device_of(device), dtype_of(dtype, shape)
        self._share = Share(rank, ranks)
        if threads:
            torch.set_num_threads(threads)
        tensors = Weights(model_dir, weights)
        self._loader = Loader(tensors, shape, self._dtype, self._device)
        placements = first_placements(shape, ranks, spare_slots)
        with torch.inference_mode():
            self._parts = [self._load(layer, placements.get(layer)) for layer in range(shape.layers)]
        tensors.check_all_taken(within=".mlp.")
        layout = layout_for(shape, self._dtype, 1, 1)
        #: Where attention ranks of this host connect, and, if they may, those of others; see `SplitPlaces.addresses`.
        self.address, door = shared_door(layout)
        doors = [door]
        self.network_address: str | None = None
        if network is not None:
            self.network_address, door = network_door(network.host, network.trust, layout, self._device)
            doors.append(door)
        self._inlet = Inlet(doors)

    def serve(self) -> None:
        """Compute what comes until `close`."""
        with torch.inference_mode():
            for peer, (header, lane) in self._inlet.messages():
                began = time.perf_counter_ns()
                try:
                    self._compute(header, lane)
                except RankLost as problem:
                    self._inlet.drop(peer, str(problem))
                    continue
                self._inlet.answer(peer, header.done(time.perf_counter_ns() - began))

    def prepare(self, layer: int, version: int, placement: Placement) -> None:
        """Load what another placement of a layer has here beside what is in use; may be called while `serve` computes."""
        part = self._parts[layer]
        with torch.inference_mode():
            bank = self._bank(part.prefix, part.gain, placement[self._share.rank])
        part.banks = {**{known: one for known, one in part.banks.items() if known > version - VERSIONS_MAX}, version: bank}

    def close(self) -> None:
        """Have `serve` end; may be called by another thread."""
        self._inlet.close()

    def _compute(self, header: Header, lane: Lane) -> None:
        """Fill a lane's sums. Raises `RankLost` if what is asked means nothing here, which ends the sender, not this rank."""
        if header.layer >= len(self._parts):
            raise RankLost(f"layer {header.layer} is asked for, there are {len(self._parts)}")
        part, count = self._parts[header.layer], header.rows
        banks = part.banks
        if banks and header.version not in banks:
            raise RankLost(f"layer {header.layer} is asked for by placement {header.version}, which is not known here")
        rows, sums = lane.rows[:count].to(self._device), lane.sums[:count]
        total = torch.zeros(count, self._shape.hidden, dtype=torch.float32, device=self._device)
        if part.dense is not None:
            total = part.dense.add_to(total, rows)
        bank = banks[header.version] if banks else None
        if bank is not None:
            total = bank.add_to(total, rows, lane.weights[:count].to(self._device), lane.picks[:count].to(self._device))
        sums.copy_(total)

    def _load(self, layer: int, placement: Placement | None) -> _Part:
        prefix = f"model.layers.{layer}."
        _, gain = self._loader.norm(prefix + "post_attention_layernorm.weight")
        prefix += "mlp."
        if placement is None:
            return _Part(prefix, gain, self._loader.mlp(prefix, gain, self._share), {})
        self._loader.leave_experts(prefix)
        return _Part(prefix, gain, None, {0: self._bank(prefix, gain, placement[self._share.rank])})

    def _bank(self, prefix: str, gain: Tensor | None, experts: Sequence[int]) -> ExpertBank | None:
        return self._loader.bank(prefix, gain, experts) if experts else None
