"""Which rank holds copies of which expert, by measured load. Pure: live FFN ranks and simulated ones are placed by this.

The idea is that of the load balancer of DeepSeek (github.com/deepseek-ai/EPLB): spare slots go to copies of what is hottest,
a copy carries its part of the expert's load, and copies are packed so that ranks carry about the same.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: A layer's placement: by rank, the experts in its slots. No rank has an expert twice.
Placement = tuple[tuple[int, ...], ...]
#: What is left of a load when the next one is added.
DECAY = 0.5
#: Picks of a layer for each of its experts without which its loads say nothing.
PICKS_MIN = 32


def place_experts(loads: Sequence[float], ranks: int, slots: int) -> Placement:
    """Place one layer's experts; the same for the same arguments.

    Args:
        loads: what each expert has to do, in any unit; all 0 places them evenly.
        ranks: ranks that share the layer.
        slots: slots of each rank; together at least one for each expert. What is over holds copies, as far as an expert can have
            any more: one a rank.

    Raises:
        ValueError: if the slots do not suffice, or there is no rank.
    """
    if ranks < 1 or ranks * slots < len(loads):
        raise ValueError(f"{len(loads)} experts do not fit into {ranks} ranks of {slots} slots")
    copies = _copies(loads, ranks, slots)
    parts = sorted(
        ((loads[expert] / count, expert) for expert, count in enumerate(copies) for _ in range(count)),
        key=lambda part: (-part[0], part[1]),
    )
    held: list[list[int]] = [[] for _ in range(ranks)]
    carried = [0.0] * ranks
    for load, expert in parts:
        rank = _room(held, carried, slots, expert)
        held[rank].append(expert)
        carried[rank] += load
    return tuple(tuple(sorted(experts)) for experts in held)


def imbalance(loads: Sequence[float], placement: Placement) -> float:
    """Return how much more the busiest rank has to do than the mean, as a share of the mean: 0 is perfect; 0 without any load.

    An expert's load is shared equally by its copies.
    """
    copies = copies_of(placement)
    carried = [sum(loads[expert] / copies[expert] for expert in experts) for experts in placement]
    mean = sum(carried) / len(carried)
    return max(carried) / mean - 1 if mean > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Move:
    """A layer's experts are to be placed anew."""

    layer: int
    #: Of the layer's placements: 0 is the first.
    version: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class ExpertBalance:
    """How evenly a group's experts are spread, and what moving them has brought.

    Either imbalance is the mean over the layers whose loads are known, by what experts had to do lately.
    """

    #: Layers placed anew since the beginning.
    moves: int
    #: As they are placed now, and as they were placed at first.
    imbalance: float
    imbalance_first: float


class ExpertBalancer:
    """Decides which layer's experts move next, one layer at a time.

    Args:
        placements: where each layer's experts are at first.
        slots: of each rank, in every layer.
        imbalance_max: a layer is placed anew whose `imbalance` is above; 0: none ever is.
    """

    def __init__(self, placements: Mapping[int, Placement], slots: int, imbalance_max: float) -> None:
        self._slots = slots
        self._imbalance_max = imbalance_max
        self._first = dict(placements)
        self._placements = dict(placements)
        self._versions = dict.fromkeys(placements, 0)
        self._loads: dict[int, list[float]] = {}

    def observe(self, picks: Sequence[Sequence[int]]) -> None:
        """Take how often each expert of each layer was picked since the last time."""
        for layer in self._placements:
            before = self._loads.get(layer, [0.0] * len(picks[layer]))
            self._loads[layer] = [DECAY * load + count for load, count in zip(before, picks[layer], strict=True)]

    def next_move(self) -> Move | None:
        """Return the move of the most uneven layer that another placement evens out; None if there is none."""
        if not self._imbalance_max:
            return None
        uneven = sorted(((self.imbalance_of(layer), layer) for layer in self._loads), reverse=True)
        for found, layer in uneven:
            if found <= self._imbalance_max:
                return None
            loads, placement = self._loads[layer], self._placements[layer]
            better = place_experts(loads, len(placement), self._slots)
            # Less is not worth reading weights for.
            if imbalance(loads, better) < 0.8 * found:
                return Move(layer, self._versions[layer] + 1, better)
        return None

    def moved(self, move: Move) -> None:
        """Note that all ranks go by a move now."""
        self._placements[move.layer], self._versions[move.layer] = move.placement, move.version

    def imbalance_of(self, layer: int) -> float:
        """Return a layer's imbalance as it is placed now; 0 while too little is known of its loads."""
        return imbalance(self._loads[layer], self._placements[layer]) if self._known(layer) else 0.0

    @property
    def balance(self) -> ExpertBalance | None:
        """How evenly experts are spread; None while too little is known of every layer's loads."""
        known = [layer for layer in self._loads if self._known(layer)]
        if not known:
            return None
        now, first = (
            sum(imbalance(self._loads[layer], placements[layer]) for layer in known) / len(known)
            for placements in (self._placements, self._first)
        )
        return ExpertBalance(sum(self._versions.values()), now, first)

    def _known(self, layer: int) -> bool:
        loads = self._loads[layer]
        return sum(loads) >= PICKS_MIN * len(loads)


def copies_of(placement: Placement) -> Mapping[int, int]:
    """Return how many copies each expert has."""
    copies: dict[int, int] = {}
    for experts in placement:
        for expert in experts:
            copies[expert] = copies.get(expert, 0) + 1
    return copies


def _copies(loads: Sequence[float], ranks: int, slots: int) -> list[int]:
    """Give each spare slot to the expert whose copies carry most; none has more copies than there are ranks."""
    copies = [1] * len(loads)
    if ranks == 1:
        return copies
    hottest = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(hottest)
    spare = ranks * slots - len(loads)
    while spare and hottest:
        load, expert = heapq.heappop(hottest)
        if load == 0.0:
            break  # nobody needs another copy of what is not asked for
        copies[expert] += 1
        spare -= 1
        if copies[expert] < ranks:
            heapq.heappush(hottest, (-loads[expert] / copies[expert], expert))
    return copies


def _room(held: list[list[int]], carried: list[float], slots: int, expert: int) -> int:
    """Return the rank with room that carries least and lacks the expert; where all with room have it, one of them gives way."""
    open_ranks = [rank for rank, experts in enumerate(held) if len(experts) < slots]
    fitting = [rank for rank in open_ranks if expert not in held[rank]]
    if fitting:
        return min(fitting, key=lambda rank: (carried[rank], len(held[rank]), rank))
    # Every rank with room has a copy already: a rank without one hands an expert over that the open rank lacks.
    target = open_ranks[0]
    source = next(rank for rank, experts in enumerate(held) if expert not in experts)
    moved = next(one for one in held[source] if one not in held[target])
    held[source].remove(moved)
    held[target].append(moved)
    return source
