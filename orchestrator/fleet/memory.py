"""What a controller writes into Ray's tables, so that its next life goes on where it was. No secret is among it.

A secret that stands in the cluster file itself, or was drawn, is known to the cluster's processes alone: a controller that starts
again asks one of them. One that is only named there (`env:NAME`, `file:PATH`) is found again even if all of them are gone.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from ray.experimental import internal_kv as typed_internal_kv

from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import NodeId, PoolName
from orchestrator.fleet.processes import Part, ProcessName
from orchestrator.fleet.words import Keep
from orchestrator.live.secret import is_named

#: Ray's own annotations are too loose for the checker.
internal_kv = cast(Any, typed_internal_kv)

_NAMESPACE = b"weft"
#: Fields of a cluster file that hold secrets, or lists of them.
_SECRETS = ("secret", "key", "keys")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a former life of a controller wrote down."""

    config: ClusterConfig
    kept: Keep
    #: True if secrets stood in the cluster file: `config` has names in their places.
    lacks_secrets: bool


def write(cluster: str, config: ClusterConfig, kept: Keep) -> None:
    """Write down a controller's state; replaces what was written before."""
    mapping = _plain(asdict(config))
    concealed = _conceal(mapping, itertools.count(1))
    content = {
        "config": concealed,
        "lacks_secrets": concealed != mapping,
        "parts": [[part.pool, part.number, list(part.nodes), part.host] for part in kept.parts],
        "drained": list(kept.drained),
        "next_numbers": dict(kept.next_numbers),
    }
    internal_kv._internal_kv_put(cluster.encode(), json.dumps(content).encode(), overwrite=True, namespace=_NAMESPACE)


def read(cluster: str) -> Memory | None:
    """Return what was written last; None if nothing was."""
    found = internal_kv._internal_kv_get(cluster.encode(), namespace=_NAMESPACE)
    if found is None:
        return None
    content = json.loads(found)
    parts = tuple(
        Part(PoolName(pool) if pool is not None else None, number, tuple(map(NodeId, nodes)), *host)
        for pool, number, nodes, *host in content["parts"]  # a host is missing where an older controller wrote
    )
    kept = Keep(parts, tuple(map(ProcessName, content["drained"])), content["next_numbers"])
    return Memory(ClusterConfig.from_mapping(content["config"]), kept, content["lacks_secrets"])


def forget(cluster: str) -> None:
    """Delete what was written: the cluster has ended."""
    internal_kv._internal_kv_del(cluster.encode(), namespace=_NAMESPACE)


def _conceal(value: Any, numbers: Iterator[int], within: str = "") -> Any:
    """Return a parsed file with names in the places of its secrets; what they name is set nowhere unless somebody sets it."""
    if isinstance(value, dict):
        return {key: _conceal(entry, numbers, key) for key, entry in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_conceal(entry, numbers, within) for entry in cast(list[Any], value)]
    if within in _SECRETS and value and not is_named(value):
        return f"env:WEFT_SECRET_{next(numbers)}"
    return value


def _plain(value: Any) -> Any:
    """Return a value as a parsed file would have it: what is None is left out."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in cast(Mapping[str, Any], value).items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in cast(Sequence[Any], value)]
    return value
