"""Secrets that a cluster file names instead of holding them."""

from pathlib import Path

import pytest

from orchestrator.core.config import (
    ClusterConfig,
    ClusterSettings,
    ConfigError,
    GatewayConfig,
    PoolConfig,
    StoreConfig,
    TenantConfig,
)
from orchestrator.core.types import PoolKind
from orchestrator.live.secret import drawn_secret, reveal, with_secrets


def test_a_secret_is_in_the_file_the_environment_or_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TEST_KEY", "from the environment")
    (tmp_path / "secret").write_text("from a file\n")
    assert reveal("as it stands: env:WEFT_TEST_KEY", "x") == "as it stands: env:WEFT_TEST_KEY"
    assert reveal("env:WEFT_TEST_KEY", "x") == "from the environment"
    assert reveal(f"file:{tmp_path}/secret", "x") == "from a file"


@pytest.mark.parametrize(
    ("text", "content", "problem"),
    [
        ("env:WEFT_TEST_NOT_THERE", None, "env:WEFT_TEST_NOT_THERE is not set on this host"),
        ("env:", None, "env: is not set on this host"),
        ("file:{folder}/none", None, "No such file or directory"),
        ("file:{folder}", None, "Is a directory"),
        ("file:{folder}/secret", b"\n", "is empty on this host"),
        ("file:{folder}/secret", b"\xff\xfe", "is not UTF-8 text"),
        ("file:{folder}/secret", b"x" * 70000, "are no secret"),
    ],
)
def test_a_secret_that_is_not_there_is_told_by_its_field(tmp_path: Path, text: str, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        reveal(text.format(folder=tmp_path), "cluster.secret")
    assert caught.value.where == "cluster.secret"
    assert problem in caught.value.problem


def test_all_secrets_of_a_cluster_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TEST_KEY", "k")
    config = ClusterConfig(
        ClusterSettings(secret="env:WEFT_TEST_KEY"),
        GatewayConfig(metrics_key="env:WEFT_TEST_KEY"),
        pools=(PoolConfig("pool", PoolKind.AGGREGATED),),
        tenants=(TenantConfig("a", ("plain",)), TenantConfig("b", ("other", "env:WEFT_TEST_KEY"))),
    )
    found = with_secrets(config)
    assert found.cluster.secret == "k"
    assert [tenant.keys for tenant in found.tenants] == [("plain",), ("other", "k")]
    assert found.gateway.metrics_key == "k"


def test_a_tenants_key_that_is_not_there_or_another_ones_is_told_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TEST_KEY", "plain")
    pools = (PoolConfig("pool", PoolKind.AGGREGATED),)
    lacking = ClusterConfig(pools=pools, tenants=(TenantConfig("a", ("plain", "env:WEFT_TEST_NONE")),))
    with pytest.raises(ConfigError) as caught:
        with_secrets(lacking)
    assert str(caught.value) == "tenants[0].keys[1]: env:WEFT_TEST_NONE is not set on this host"
    same = ClusterConfig(pools=pools, tenants=(TenantConfig("a", ("plain",)), TenantConfig("b", ("env:WEFT_TEST_KEY",))))
    with pytest.raises(ConfigError) as caught:
        with_secrets(same)
    assert str(caught.value) == "tenants[1].keys[0]: is a key of a already"


def test_a_secret_is_drawn_anew_unless_blocks_are_kept_that_are_called_by_it(tmp_path: Path) -> None:
    pools = (PoolConfig(name="all", kind=PoolKind.AGGREGATED),)
    forgetful = ClusterConfig(pools=pools)
    assert drawn_secret(forgetful) != drawn_secret(forgetful)
    keeping = ClusterConfig(pools=pools, store=StoreConfig(cpu_bytes=1, cmx=f"file://{tmp_path}/cmx"))
    assert drawn_secret(keeping) == drawn_secret(keeping)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"store\.cmx: .*Not a directory"):
        drawn_secret(ClusterConfig(pools=pools, store=StoreConfig(cpu_bytes=1, cmx=f"file://{tmp_path}/file/cmx")))
