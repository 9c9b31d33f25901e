"""How a given configuration differs from the one that a cluster runs with, and what it takes to change that. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

from orchestrator.core.config import GATEWAYS, ClusterConfig, PoolConfig, shown

#: Fields whose change no running cluster can take in parts: old and new processes would not understand each other.
_FIXED_FIELDS = ("cluster.name", "cluster.secret")
_FIXED_IN_POOLS = (".name", ".kind", ".model", ".nodes_per_process", ".engine.block_tokens", ".drafter")
#: Fields that hold secrets, which are not shown.
_SECRET = ("secret", "key", "keys", "tenants")
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that is not as it runs."""

    where: str
    running: Any
    given: Any

    def __str__(self) -> str:
        """Return the difference as operators read it; secrets are not shown."""
        if any(part in _SECRET for part in self.where.replace("[", ".").split(".")):
            return f"{self.where} (changed)"
        return f"{self.where} {_text(self.running)} -> {_text(self.given)}"


@dataclass(frozen=True, slots=True)
class Changes:
    """What it takes to run as another configuration says."""

    #: Nodes of each pool, and gateways, that are to be.
    sizes: Mapping[str, int]
    #: All but the sizes.
    differences: tuple[Difference, ...]
    #: Groups whose processes must start anew for them.
    restarts: tuple[str, ...]
    #: Those of the differences that a running cluster cannot take.
    fixed: tuple[Difference, ...]


def changes_between(running: ClusterConfig, given: ClusterConfig) -> Changes:
    """Return what leads from one configuration to another."""
    names, before = [pool.name for pool in given.pools], {pool.name: pool for pool in running.pools}
    sizes = {pool.name: pool.nodes for pool in given.pools if pool.name in before} | {GATEWAYS: given.gateway.count}
    found = tuple(_differences("", _unsized(running), _unsized(given)))
    fixed: list[Difference] = []
    restarts: dict[str, None] = {}
    if names != [pool.name for pool in running.pools]:
        fixed.append(Difference("pools", [pool.name for pool in running.pools], names))
        found = (*fixed, *(one for one in found if not one.where.startswith("pools")))
    for one in found:
        if one in fixed or _is_fixed(one):
            fixed += [] if one in fixed else [one]
        else:
            restarts |= dict.fromkeys(_readers(one.where, names))
    return Changes(sizes, found, tuple(group for group in (*names, GATEWAYS) if group in restarts), tuple(fixed))


def with_sizes(config: ClusterConfig, sizes: Mapping[str, int]) -> ClusterConfig:
    """Return a configuration with other numbers of nodes and gateways."""
    pools = tuple(replace(pool, nodes=max(sizes.get(pool.name, pool.nodes), 1)) for pool in config.pools)
    gateway = replace(config.gateway, count=max(sizes.get(GATEWAYS, config.gateway.count), 1))
    return replace(config, gateway=gateway, pools=pools)


def _unsized(config: ClusterConfig) -> ClusterConfig:
    return with_sizes(config, dict.fromkeys([GATEWAYS, *(pool.name for pool in config.pools)], 1))


def _is_fixed(one: Difference) -> bool:
    where = one.where
    if where.startswith("models."):  # a model more or less, or another checkpoint
        return one.running is _ABSENT or one.given is _ABSENT or where.endswith(".path")
    if where.startswith("store"):  # what stores hold and what objects are called depends on it
        return True
    return where in _FIXED_FIELDS or (where.startswith("pools[") and where.endswith(_FIXED_IN_POOLS))


def _readers(where: str, pools: list[str]) -> list[str]:
    """Return the groups whose processes read a field."""
    if where.startswith("pools["):
        # Gateways read of pools only what each node tells of itself.
        return [pools[int(where[len("pools[") : where.index("]")])]]
    return [*pools, GATEWAYS] if where.startswith("cluster.") else [GATEWAYS]


def _differences(where: str, running: Any, given: Any) -> Iterator[Difference]:
    before, after = _parts(running), _parts(given)
    # Lists of different lengths differ as a whole.
    comparable = type(running) is type(given) and (not isinstance(running, tuple) or len(before) == len(after))
    if before and after and comparable:
        for name in dict.fromkeys([*before, *after]):
            yield from _differences(f"{where}{name}".removeprefix("."), before.get(name, _ABSENT), after.get(name, _ABSENT))
    elif running != given:
        yield Difference(where, running, given)


def _parts(value: Any) -> dict[str, Any]:
    """Return what a value consists of, by the ending that each part's name has; nothing if it has no parts."""
    if is_dataclass(value):
        return {f".{item.name}": getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return {f".{key}": entry for key, entry in cast(Mapping[str, Any], value).items()}
    if isinstance(value, tuple):
        return {f"[{index}]": entry for index, entry in enumerate(cast(tuple[Any, ...], value))}
    return {}


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    if isinstance(value, PoolConfig):
        return value.name
    return shown(list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value)
