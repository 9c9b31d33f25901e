"""A group of split decode: its leader, which the controller knows as one process, owns the actors of all other ranks.

The leader is the first attention rank. It starts the FFN ranks, then the other attention ranks, each in its bundle of the group's
placement group, on its host or on others, and watches them: when one dies or hangs the leader ends, and with it, since it owns
them, all others. The controller then starts the group anew; its requests go on elsewhere. The leader also moves experts between
FFN ranks.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray as typed_ray
from ray.exceptions import RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.core.config import ClusterConfig, SplitConfig
from orchestrator.core.experts import ExpertBalancer, Placement
from orchestrator.core.types import NodeId, PoolKind
from orchestrator.fleet.actors import Description, HostStores, NodeProcess, asking, model_folder, remote
from orchestrator.fleet.processes import Part, bundles_of, pool_of
from orchestrator.fleet.vital import end_by, own_vital
from orchestrator.live.secret import with_secrets
from orchestrator.wire.logs import open_log
from orchestrator.wire.trust import read_trust
from workers.engines.base import NetworkPlace, SplitPlaces
from workers.ranks import BeatFfnServer, FfnServer, added_up, balancer_of, open_rank

#: Ray's own annotations are too loose for the checker.
ray = cast(Any, typed_ray)

log = logging.getLogger("weft.group")

#: Seconds between two looks at the group's ranks.
LOOK_EVERY_S = 1.0
#: Seconds that ranks get to load their weights.
START_S = 900.0
#: Seconds that ranks get to answer a question.
ASK_S = 10.0


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where an FFN rank is: on which host, as Ray names it, and its addresses for those of that host and for others."""

    host: str
    address: str
    network_address: str | None

    def seen_from(self, host: str) -> str:
        """Return the address for attention ranks of a host."""
        address = self.address if host == self.host else self.network_address
        assert address is not None, f"a rank on host {self.host} is for that host alone, not for {host}"
        return address


class FfnProcess:
    """Actor: one FFN rank."""

    def __init__(self) -> None:
        self._server: FfnServer | BeatFfnServer | None = None
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def start(self, config: ClusterConfig, part: Part, rank: int) -> RankPlace:
        """Load the rank's weights, serve, and say where."""
        pool = pool_of(config, part)
        assert pool.split is not None, f"{part.name} is no group"
        open_log(f"{part.name}-ffn-{rank}", config.log)
        network: NetworkPlace | None = None
        if pool.split.across_hosts:
            cluster = with_secrets(config).cluster
            network = NetworkPlace(ray.util.get_node_ip_address(), read_trust(cluster.secret, cluster.tls))
        self._server = open_rank(pool, model_folder(config, pool.model), rank, end_by, network)
        return RankPlace(own_vital().host, self._server.address, self._server.network_address)

    def prepare(self, layer: int, version: int, placement: Placement) -> None:
        """Load what another placement has here; rows are computed meanwhile."""
        assert isinstance(self._server, FfnServer), "not started, or its experts stay where they are"
        self._server.prepare(layer, version, placement)

    def alive(self) -> bool:
        """Return true."""
        return True


class GroupProcess(NodeProcess):
    """Actor: the leader of a group."""

    def __init__(self, part: Part, incarnation: int) -> None:
        super().__init__(part, incarnation)
        self._ffn: list[Any] = []
        self._followers: list[Any] = []
        self._ended = threading.Event()

    @property
    def _nodes(self) -> tuple[NodeId, ...]:
        return self._part.nodes[:1]

    def start(self, config: ClusterConfig, stores: HostStores, places: SplitPlaces | None = None) -> Description | None:
        """Start all ranks of the group, this one last, and say where its nodes are."""
        assert places is None, "a leader finds its FFN ranks itself"
        pool = pool_of(config, self._part)
        split = pool.split
        assert split is not None, f"{self._part.name} is no group"
        bundles = bundles_of(config, self._part)
        first_ffn = len(self._part.nodes)
        self._ffn = [self._actor(FfnProcess, bundles, first_ffn + rank) for rank in range(split.ffn)]
        starts = [actor.start.remote(config, self._part, rank) for rank, actor in enumerate(self._ffn)]
        ranks: list[RankPlace] = ray.get(starts, timeout=START_S)
        hosts = _hosts(first_ffn)
        seen = [tuple(rank.seen_from(host) for rank in ranks) for host in hosts]
        sights = [SplitPlaces(each, split.spare_slots, split.microbatches, split.silent_s, first_ffn) for each in seen]
        parts = [Part(self._part.pool, self._part.number + place, (node,)) for place, node in enumerate(self._part.nodes)][1:]
        self._followers = [
            self._actor(NodeProcess, bundles, place, part, self._incarnation) for place, part in enumerate(parts, start=1)
        ]
        # Those that keep a beat measure their longest step as they start: one after the other, since they share FFN ranks.
        starting = [*zip(self._followers, sights[1:], strict=True)]
        waves = [[one] for one in starting] if pool.kind is PoolKind.LPX else [starting]
        described: list[Description] = []
        for wave in waves:
            described += ray.get([actor.start.remote(config, stores, sight) for actor, sight in wave], timeout=START_S)
        self._node_addresses = {one.part.nodes[0]: one.address for one in described if one.address is not None}
        super().start(config, stores, sights[0])
        for node, host in zip(self._part.nodes, hosts, strict=True):
            near, far = ([number for number, rank in enumerate(ranks) if (rank.host == host) is here] for here in (True, False))
            log.info("node %s reaches FFN ranks %s by shared memory, %s by TCP", node, near, far)
        threading.Thread(target=self._watch_ranks, args=(config.cluster.hung_s,), name="ranks", daemon=True).start()
        balancer = balancer_of(pool, model_folder(config, pool.model))
        if balancer is not None and split.ffn > 1:
            threading.Thread(target=self._balance, args=(balancer, split), name="balance", daemon=True).start()
        return self.describe()

    def set_stores(self, stores: HostStores) -> None:
        """Tell all nodes of the group which stores there are now."""
        told = [actor.set_stores.remote(stores) for actor in self._followers]
        super().set_stores(stores)
        ray.get(told, timeout=ASK_S)

    def set_drafters(self, serial: int, addresses: Sequence[str]) -> None:
        """Tell all nodes of the group which processes draft for their pool now."""
        told = [actor.set_drafters.remote(serial, addresses) for actor in self._followers]
        super().set_drafters(serial, addresses)
        ray.get(told, timeout=ASK_S)

    def drain(self, seconds: float, lingers: bool) -> bool:
        """Take nothing new on any node and let what runs end; False if some did not."""
        others = [actor.drain.remote(seconds, lingers) for actor in self._followers]
        clean = super().drain(seconds, lingers)
        return all([clean, *ray.get(others, timeout=seconds + ASK_S)])

    def stop(self) -> None:
        """Stop serving, on all ranks."""
        self._ended.set()
        stopped = [actor.stop.remote() for actor in self._followers]
        super().stop()
        ray.wait(stopped, num_returns=len(stopped), timeout=ASK_S) if stopped else None
        for actor in (*self._followers, *self._ffn):
            ray.kill(actor)

    def _actor(self, kind: type, bundles: list[dict[str, float]], place: int, *arguments: Any) -> Any:
        """Start a rank in its bundle; it ends when this process does."""
        group = get_current_placement_group()
        assert group is not None, "a leader has its place in a group"
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place)
        options = {"max_concurrency": 8, "scheduling_strategy": strategy, **asking(bundles[place])}
        return remote(kind, options).remote(*arguments)

    def _watch_ranks(self, hung_s: float) -> None:
        """End this process, and so the group, when a rank has died or hangs."""
        ranks = (*self._followers, *self._ffn)
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                ray.get([actor.alive.remote() for actor in ranks], timeout=hung_s)
            except (RayError, TimeoutError) as error:
                if not self._ended.is_set():
                    end_by(error)

    def _balance(self, balancer: ExpertBalancer, split: SplitConfig) -> None:
        """Move experts as the balancer says, for as long as the group is there."""
        while not self._ended.wait(split.balance_s):
            try:
                others: list[list[list[int]]] = ray.get([one.take_picks.remote() for one in self._followers], timeout=ASK_S)
                balancer.observe(added_up([self.take_picks(), *others]))
                self._serving.tell_balance(balancer.balance)
                self._move_experts(balancer)
            except (RayError, TimeoutError) as error:
                if not self._ended.is_set():
                    end_by(error)

    def _move_experts(self, balancer: ExpertBalancer) -> None:
        move = balancer.next_move()
        while move is not None and not self._ended.is_set():
            began, before = time.monotonic(), balancer.imbalance_of(move.layer)
            step = (move.layer, move.version, move.placement)
            ray.get([actor.prepare.remote(*step) for actor in self._ffn], timeout=START_S)
            ray.get([actor.use_experts.remote(*step) for actor in self._followers], timeout=ASK_S)
            self.use_experts(*step)
            balancer.moved(move)
            self._serving.tell_balance(balancer.balance)
            after = balancer.imbalance_of(move.layer)
            log.info(
                "experts of layer %d moved in %.2f s: imbalance %.2f, was %.2f",
                move.layer,
                time.monotonic() - began,
                after,
                before,
            )
            move = balancer.next_move()


def _hosts(count: int) -> list[str]:
    """Return the hosts, as Ray names them, of the first bundles of the group's placement group."""
    table: dict[str, Any] = ray.util.placement_group_table(get_current_placement_group())
    return [table["bundles_to_node_id"][number] for number in range(count)]
