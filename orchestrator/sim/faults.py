"""What goes wrong in a simulated cluster, and when: drawn once from a seed, so that a run with faults can be had again.

A fault never makes the cluster wrong, only slower: every request must still end, well or with one clear error.
"""

from dataclasses import dataclass, fields

from orchestrator.core.config import require

#: Of whatever is counted: more would only take long.
COUNT_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Faults:
    """How much goes wrong until `until_s`; nothing does after it, so that a run can be seen to recover.

    Raises `ConfigError` for a chance outside [0, 1], a negative number, an endless count or a speed-up of slow nodes.
    """

    until_s: float
    #: Nodes that stop dead, and seconds until each is back, empty.
    crashes: int = 0
    restart_s: float = 5.0
    #: Nodes that stand still and keep their connections, until they are found hung (`hung_s`) and started anew in `restart_s`.
    hangs: int = 0
    #: Gateways that do so. Their clients wait until they are killed, and go to others while they are away.
    gateway_hangs: int = 0
    #: Chance that a message between gateway and node, or between nodes, is late, and by how many seconds at most.
    late_share: float = 0.0
    late_s_max: float = 0.5
    #: Chance that a report loses its news of blocks: the gateway must notice the gap and ask.
    lost_kv_share: float = 0.0
    #: Chance that a hand-over of blocks breaks off.
    broken_fetch_share: float = 0.0
    #: Chance that a client goes away, and seconds after which at most.
    abandoned_share: float = 0.0
    abandoned_s_max: float = 2.0
    #: Hosts' stores that stop dead, with all they have in memory; each is back after `restart_s`.
    store_crashes: int = 0
    #: Chance that a transfer to or from `cmx` fails: what is read is damaged, what is written is not taken.
    damaged_share: float = 0.0
    #: Nodes whose steps take `slowness` times as long.
    slow_nodes: int = 0
    slowness: float = 3.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            require(value >= 0, item.name, f"must be 0 or more, is {value:g}")
            require(not item.name.endswith("_share") or value <= 1, item.name, f"must be a share, 1 at most, is {value:g}")
        for name in ("crashes", "hangs", "gateway_hangs", "store_crashes", "slow_nodes"):
            require(getattr(self, name) <= COUNT_MAX, name, f"must be at most {COUNT_MAX}, is {getattr(self, name)}")
        require(self.slowness >= 1, "slowness", f"must be 1 or more, is {self.slowness:g}")
