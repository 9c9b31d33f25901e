"""An attention rank's side of the FFN half: routes rows to the ranks that own their experts and adds up what comes back."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from orchestrator.core.experts import Placement, copies_of
from orchestrator.core.types import SplitLoad
from orchestrator.profiles.model_config import Architecture
from workers.engines.adapters import AdaptedRows
from workers.engines.experts import Router
from workers.engines.mlp import Finish, GatedMlp
from workers.engines.split.lanes import Header, Link
from workers.engines.split.microbatches import Microbatches

#: A slot that no rank has: what a rank is told of picks that are not its own.
ELSEWHERE = 1 << 30


@dataclass(slots=True)
class HalvesTimes:
    """What the halves did, summed since the engine began. Seconds."""

    #: Whole steps.
    step_s: float = 0.0
    #: Waking FFN ranks and waiting for them.
    waited_s: float = 0.0
    #: The busiest FFN rank's computing, message by message; and that of all together.
    ffn_s: float = 0.0
    ffn_all_s: float = 0.0
    #: Rows sent, by layer and micro-batch.
    rows: int = 0


class Routes:
    """Where a layer's experts are, as tensors; another placement takes the place of this one as a whole."""

    __slots__ = ("_copies", "_ranks", "_slots", "version")

    def __init__(self, placement: Placement, version: int, device: torch.device) -> None:
        copies = copies_of(placement)
        widest = max(copies.values())
        self.version = version
        self._copies = torch.tensor([copies[expert] for expert in range(len(copies))], device=device)
        self._ranks = torch.zeros(len(copies), widest, dtype=torch.int64)
        self._slots = torch.zeros(len(copies), widest, dtype=torch.int64)
        seen = [0] * len(copies)
        for rank, experts in enumerate(placement):
            for slot, expert in enumerate(experts):
                self._ranks[expert, seen[expert]], self._slots[expert, seen[expert]] = rank, slot
                seen[expert] += 1
        self._ranks, self._slots = self._ranks.to(device), self._slots.to(device)

    def find(self, picked: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Return rank and slot of each pick [rows, picks]; rows take an expert's copies in turn."""
        turns = torch.arange(turn, turn + len(picked), device=picked.device)[:, None]
        copy = turns % self._copies[picked]
        return self._ranks[picked, copy], self._slots[picked, copy]


class SplitGroup:
    """The FFN ranks that one attention rank sends rows to."""

    def __init__(
        self,
        links: Sequence[Link],
        shape: Architecture,
        placements: Mapping[int, Placement],
        device: torch.device,
        microbatches: Microbatches,
        attention: int = 1,
    ) -> None:
        self.links = tuple(links)
        self._attention = attention
        self.microbatches = microbatches
        self.times = HalvesTimes()
        self._device = device
        self._routes = {layer: Routes(placement, 0, device) for layer, placement in placements.items()}
        layers, experts = shape.layers, shape.experts.count if shape.experts is not None else 0
        #: Rows that picked each expert, by layer, since the last look.
        self.picks = np.zeros((layers, experts), dtype=np.int64)

    def use(self, layer: int, version: int, placement: Placement) -> None:
        """Route by another placement from now on; each FFN rank must have prepared it. May be called by another thread."""
        self._routes[layer] = Routes(placement, version, self._device)

    def routes(self, layer: int) -> Routes:
        """Return the placement in use."""
        return self._routes[layer]

    def post(self, link: Link, header: Header) -> None:
        """Say that a lane is filled. Where cores are few, whoever is woken may well take this one's."""
        began = time.perf_counter()
        link.post(header)
        self.times.waited_s += time.perf_counter() - began

    def take_picks(self) -> list[list[int]]:
        """Return how many rows picked each expert of each layer since the last call."""
        counts = self.picks.copy()
        self.picks -= counts
        return counts.tolist()

    @property
    def load(self) -> SplitLoad:
        """What either half did; see `Engine.halves`."""
        times, count = self.times, len(self.links)
        far = sum(link.crosses_network for link in self.links)
        return SplitLoad(
            times.step_s - times.waited_s,
            times.ffn_all_s,
            count / self._attention,
            links_shared=count - far,
            links_network=far,
        )

    def close(self) -> None:
        """Let go of the ranks."""
        for link in self.links:
            link.close()


class RemoteFfn:
    """One layer's FFN on other ranks: a share of a dense one on each, of experts those that rows picked.

    Experts that all rows visit are computed here, while the others compute.
    """

    def __init__(self, group: SplitGroup, layer: int, router: Router | None, shared: GatedMlp | None) -> None:
        self._group = group
        self._layer = layer
        self.router = router
        self._shared = shared
        self._turn = 0

    def begin(self, rows: Tensor, adapted: AdaptedRows) -> Finish:
        """Send rows to their ranks; see `Ffn.begin`."""
        sent = self._send_all(rows) if self.router is None else self._send_picked(rows, self.router)
        self._group.times.rows += len(rows)
        return partial(self._finish, rows, adapted, sent)

    def _send_all(self, rows: Tensor) -> list[tuple[Link, Tensor | None]]:
        for link in self._group.links:
            number, lane = link.take()
            lane.rows[: len(rows)] = rows
            self._group.post(link, Header(number, self._layer, 0, len(rows)))
        return [(link, None) for link in self._group.links]

    def _send_picked(self, rows: Tensor, router: Router) -> list[tuple[Link, Tensor | None]]:
        weights, picked = router.route(rows)
        self._group.picks[self._layer] += torch.bincount(picked.view(-1), minlength=self._group.picks.shape[1]).numpy(force=True)
        routes = self._group.routes(self._layer)
        ranks, slots = routes.find(picked, self._turn)
        self._turn += len(rows)
        sent: list[tuple[Link, Tensor | None]] = []
        for rank, link in enumerate(self._group.links):
            here = ranks == rank
            chosen = here.any(1).nonzero().view(-1)
            count = len(chosen)
            if not count:
                continue
            number, lane = link.take()
            lane.rows[:count] = rows.index_select(0, chosen)
            lane.weights[:count] = weights.index_select(0, chosen)
            lane.picks[:count] = torch.where(here, slots, ELSEWHERE).index_select(0, chosen)
            self._group.post(link, Header(number, self._layer, routes.version, count))
            sent.append((link, chosen))
        return sent

    def _finish(self, rows: Tensor, adapted: AdaptedRows, sent: list[tuple[Link, Tensor | None]], state: Tensor) -> Tensor:
        times, busiest = self._group.times, 0
        if self._shared is not None:
            state = self._shared.add_to(state, rows, adapted)
        for link, chosen in sent:
            began = time.perf_counter()
            header, lane = link.wait()
            times.waited_s += time.perf_counter() - began
            busiest = max(busiest, header.busy_ns)
            times.ffn_all_s += header.busy_ns * 1e-9
            sums = lane.sums[: header.rows].to(state.device)
            state = state.add_(sums) if chosen is None else state.index_add_(0, chosen, sums)
            link.give(header.lane)
        times.ffn_s += busiest * 1e-9
        return state
