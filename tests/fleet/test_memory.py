"""What a controller writes down: all it needs, and no secret."""

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from orchestrator.core.config import ClusterConfig, ClusterSettings, GatewayConfig, TenantConfig
from orchestrator.core.types import CostProfile
from orchestrator.fleet import memory
from orchestrator.fleet.processes import Part, ProcessName, parts_of
from orchestrator.fleet.words import Keep
from tests.fleet.clusters import small


class Table:
    """Stands for Ray's table of names and values."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def _internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes) -> None:
        self.values[namespace + key] = value

    def _internal_kv_get(self, key: bytes, namespace: bytes) -> bytes | None:
        return self.values.get(namespace + key)

    def _internal_kv_del(self, key: bytes, namespace: bytes) -> None:
        self.values.pop(namespace + key, None)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    table = Table()
    monkeypatch.setattr(memory, "internal_kv", table)
    return table


def remembered(config: ClusterConfig, kept: Keep) -> Any:
    memory.write("c", config, kept)
    return memory.read("c")


def test_a_cluster_is_remembered_whole(table: Table) -> None:
    config = small()
    pool = replace(config.pools[1], profile=CostProfile(fetch_bytes_per_s=inf, batch_tokens=(1, 2), batch_s=(0.1, 0.2)))
    config = replace(config, pools=(config.pools[0], pool))
    kept = Keep((*parts_of(config), Part(None, 4)), (ProcessName("node-decode-1"),), {"prefill": 1, "decode": 9})
    assert remembered(config, kept) == memory.Memory(config, kept, lacks_secrets=False)
    memory.forget("c")
    assert memory.read("c") is None


def test_secrets_that_stand_in_the_file_are_not_written_and_named_ones_stay(table: Table) -> None:
    tenants = (TenantConfig("a", ("sk-one", "env:KEY")), TenantConfig("c", ("sk-two",)))
    config = small(cluster=ClusterSettings(secret="hush"), prefill=1)
    config = replace(config, gateway=GatewayConfig(host="0.0.0.0"), tenants=tenants)
    found = remembered(config, Keep((), (), {}))
    (content,) = table.values.values()
    assert [word for word in (b"hush", b"sk-one", b"sk-two") if word in content] == []
    assert found.lacks_secrets
    assert [key.startswith("env:") for tenant in found.config.tenants for key in tenant.keys] == [True, True, True]
    assert found.config.tenants[0].keys[1] == "env:KEY"
    assert found.config.cluster.secret.startswith("env:")
