"""Cluster files: those that are shipped are sound, and a bad one is answered with its line."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from orchestrator.cli.cluster_file import (
    AGENT_SESSION,
    FOLDER,
    LOCAL_CLUSTER,
    UnusableInput,
    check_file,
    check_folder,
    line_of,
    read_cluster,
    with_model,
)
from orchestrator.core.config import (
    AdapterConfig,
    ClusterConfig,
    ClusterSettings,
    EngineConfig,
    GatewayConfig,
    HardwareConfig,
    LeasesConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    PoolConfig,
    RouterConfig,
    SchedulerConfig,
    SplitConfig,
    StoreConfig,
    TenantConfig,
    TlsConfig,
    TraceConfig,
)
from orchestrator.core.types import CostProfile, GatewayId, PoolKind
from orchestrator.live.metrics import Metrics
from orchestrator.traces import read_trace
from tests.builders import some

PARTS = (
    ClusterSettings,
    TlsConfig,
    LogConfig,
    TraceConfig,
    GatewayConfig,
    TenantConfig,
    LeasesConfig,
    LimitsConfig,
    RouterConfig,
    ModelConfig,
    StoreConfig,
)
README = FOLDER / "README.md"
#: The tables of which the default file sets fields.
BY_TABLE = {
    "cluster": ClusterSettings, "gateway": GatewayConfig, "router": RouterConfig, "pools": PoolConfig,
    "pools.engine": EngineConfig, "pools.scheduler": SchedulerConfig, "pools.profile": CostProfile,
}  # fmt: skip
#: Names of metrics in queries and tables.
METRIC = r"(?:weft_|vllm:)\w+"
TABLES = (*PARTS, PoolConfig, EngineConfig, SchedulerConfig, CostProfile, HardwareConfig)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.toml")), ids=lambda path: path.name)
def test_every_shipped_cluster_file_can_be_read(path: Path) -> None:
    assert read_cluster(path).pools


def test_the_default_file_names_every_field() -> None:
    text = LOCAL_CLUSTER.read_text()
    for table in TABLES:
        for name in (item.name for item in fields(table)):
            assert re.search(rf"^(# )?({name} = |\[+(\w+\.)*{name}(\.NAME)?\])", text, re.MULTILINE), f"{table.__name__}.{name}"


def test_the_defaults_shown_in_the_default_file_are_the_defaults() -> None:
    text = re.sub(
        r"^# (?!session_headers|disaggregation|acceptance|service_class = \S+  # an example)"
        r"(\w+ = |\[\[tenants|\[store|\[models\.default\.adapters|\[pools\.split|\[pools\.beat)",
        r"\1",
        LOCAL_CLUSTER.read_text(),
        flags=re.MULTILINE,
    )
    assert text.count("\n#") < LOCAL_CLUSTER.read_text().count("\n#") - 30
    tenant = TenantConfig("team-a", ("env:TEAM_A_KEY",))  # what of it is shown as the default is the default
    plain = read_cluster(LOCAL_CLUSTER)
    pools = tuple(replace(pool, split=SplitConfig()) if pool.kind is PoolKind.DECODE else pool for pool in plain.pools)
    models = {"default": replace(plain.models["default"], adapters={"NAME": AdapterConfig("/adapters/NAME")})}
    whole = replace(plain, tenants=(tenant,), store=StoreConfig(), models=models, pools=pools)
    assert ClusterConfig.from_mapping(tomllib.loads(text)) == whole


def test_a_line_that_differs_from_the_default_says_what_the_default_is() -> None:
    lines = list(active_lines(LOCAL_CLUSTER.read_text()))
    assert {name for name, *_ in lines} >= {"blocks", "threads", "step_s", "policy"}
    assert [name for name, value, default, said in lines if said != ([] if value == default else [default])] == []


def test_canary_a_default_that_is_wrong_or_missing_is_noticed() -> None:
    head = "[[pools]]\n[pools.engine]\n"
    assert list(active_lines(head + "threads = 1 # CPUs")) == [("threads", 1, 0, [])]
    assert list(active_lines(head + "threads = 1 # CPUs (default 2)")) == [("threads", 1, 0, [2])]


def active_lines(text: str) -> Iterator[tuple[str, object, object, list[object]]]:
    """Return a cluster file's fields up to its second pool: name, value, default, and what its comment calls the default."""
    table = ""
    for line in text.split("\n"):
        if line.startswith("["):
            if line.startswith("[[pools]]") and table.startswith("pools"):
                return
            table = line.partition("]")[0].strip("[")
        elif found := re.match(r"(\w+) = ([^#]*)(#.*)?", line):
            name, value, comment = found.groups()
            item = next(item for item in fields(BY_TABLE[table]) if item.name == name)
            if item.default is not MISSING:
                said = re.findall(r"\(default ([^\s):,]+)", comment or "")
                yield name, tomllib.loads(f"x = {value}")["x"], item.default, [tomllib.loads(f"x = {one}")["x"] for one in said]


def test_the_default_cluster_is_what_the_readme_says() -> None:
    config = read_cluster(LOCAL_CLUSTER)
    assert [(pool.kind, pool.nodes) for pool in config.pools] == [(PoolKind.PREFILL, 1), (PoolKind.DECODE, 2)]
    assert config.models["default"].path == ""


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[cluster]\nname = \n", 2, "invalid value"),
        ("[cluster]\nnames = 'a'\n", 2, "cluster.names: unknown key"),
        (
            "[[pools]]\nname = 'a'\nkind = 'decode'\n\n[[pools]]\nname = 'b'\nkind = 'decade'\n",
            7,
            "pools[1].kind: must be one of",
        ),
        ("[[pools]]\nname = 'a'\nkind = 'decode'\n[pools.engine]\nblocks = -1\n", 5, "pools[0].engine.blocks: must be 0 or more"),
        ("[[pools]]\nkind = 'decode'\n", 1, "pools[0].name: is missing"),
        ("[models.a]\n[[pools]]\nname = 'a'\nkind = 'prefill'\nmodel = 'a'\n", 1, "models.a: no pool of kind decode"),
        ("[[gateway.api_keys]]\nkey = 'k'\ntenant = 't'\n", 1, "gateway.api_keys: is no more; write a table [[tenants]]"),
        ("[[tenants]]\nname = 't'\nkeys = ['']\n", 3, "tenants[0].keys[0]: must not be empty"),
        ("[[tenants]]\nname = 't'\nclass_max = 'urgent'\n", 3, "tenants[0].class_max: must be one of batch, standard"),
        ("[gateway]\nhost = '0.0.0.0'\n[[pools]]\nname = 'a'\nkind = 'decode'\n", 2, "is not loopback"),
        # What Python's own parser gives up on: see `parsed`.
        pytest.param(f"[cluster]\nname = {'[' * 9000}\n", 2, "lists or tables are nested too deeply", id="deep"),
        pytest.param(f"[cluster]\nname = 1\ndrain_s = {'9' * 5000}\n", 3, "a number has more than 4300 digits", id="long"),
        pytest.param(f"[cluster]\ndrain_s = 0x{'f' * 5000}\n", 2, "drain_s: must be at most 2^53, is too long", id="hexadecimal"),
        ("[[pools]]\nname = 'a'\nkind = 'decode'\n[pools.profile]\nbatch_tokens = [2, 1]\nbatch_s = [1, 1]\n", 5, "ascend"),
    ],
)
def test_a_bad_file_is_answered_with_file_line_and_field(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UnusableInput) as caught:
        read_cluster(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert says in message
    assert "\n" not in message


def test_a_file_that_is_not_there_or_not_text_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="No such file"):
        read_cluster(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UnusableInput, match="not UTF-8"):
        read_cluster(tmp_path / "bytes.toml")
    with pytest.raises(UnusableInput, match="is no cluster file: it has more than"):
        read_cluster(Path("/dev/zero"))


def test_a_byte_order_mark_at_a_files_start_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf" + LOCAL_CLUSTER.read_bytes())
    assert read_cluster(tmp_path / "marked.toml") == read_cluster(LOCAL_CLUSTER)


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_place_that_cannot_be_looked_at_is_answered_with_its_option(
    check: Callable[[str, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UnusableInput, match=r"^--json .*: File name too long$"):
        check("--json", tmp_path / ("x" * 300))

    def locked(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", locked)
    with pytest.raises(UnusableInput, match=f"^--json {tmp_path}/x: Permission denied$"):
        check("--json", tmp_path / "x")
    with pytest.raises(UnusableInput, match=r"^--model .*: Permission denied$"):
        with_model(ClusterConfig.from_mapping({"pools": [{"name": "a", "kind": "decode"}]}), tmp_path, "local.toml")


def test_an_unknown_field_points_to_the_table_that_should_hold_it() -> None:
    assert line_of("[a]\n\n[[b.c]]\nd = 1\n", "b.c[0].missing.deeper") == 3
    assert line_of("[a]\n", "nothing[3].known") == 1


def test_a_model_directory_replaces_the_only_models_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = with_model(read_cluster(LOCAL_CLUSTER), tmp_path, "local.toml")
    assert config.models["default"].path == str(tmp_path)
    with pytest.raises(UnusableInput, match="several models"):
        with_model(read_cluster(FOLDER / "two-models.toml"), tmp_path, "two-models.toml")
    with pytest.raises(UnusableInput, match=r"no config\.json"):
        with_model(read_cluster(LOCAL_CLUSTER), tmp_path / "none", "local.toml")


def test_the_demos_session_has_sub_agents_and_a_compaction_and_starts_with_its_causes() -> None:
    turns = list(read_trace(AGENT_SESSION))
    assert len({turn.agent for turn in turns}) == 7
    assert all(before < turn.id for turn in some(turns) for before in turn.after)
    main = [turn.input_tokens for turn in turns if turn.agent == "main"]
    assert any(after < before / 2 for before, after in pairwise(main))


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for target in panel["targets"] for name in re.findall(METRIC, target["expr"])}
    assert asked
    assert asked <= known_names()


def test_alerts_ask_for_metrics_that_exist_and_say_what_is_wrong() -> None:
    rules = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    asked = {name for rule in rules for name in re.findall(METRIC, rule["expr"])}
    assert asked
    assert asked <= known_names()
    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}
    assert [rule["alert"] for rule in rules if not rule["annotations"]["summary"]] == []


def test_the_readmes_table_lists_every_metric_and_none_that_is_not() -> None:
    exported = {name: (kind, labels) for name, kind, labels in families()}
    listed = {name: (kind, labels) for name, kind, labels, _, _ in table(README.read_text())}
    assert listed == exported
    assert [name for name, _, _, unit, what in table(README.read_text()) if not unit or not what] == []


def test_canary_rows_that_are_missing_twice_or_wrong_are_noticed() -> None:
    text = README.read_text()
    (row,) = re.findall(r"^\| `weft_node_up` .*\n", text, re.MULTILINE)
    rows = table(text)
    assert len(table(text.replace(row, ""))) == len(rows) - 1
    assert table(text.replace(row, row.replace("weft_node_up", "weft_node_down"))) != rows
    assert table(text.replace(row, row.replace("node, pool", "node"))) != rows
    with pytest.raises(AssertionError, match="weft_node_up is listed twice"):
        table(text + row)


def table(readme: str) -> list[tuple[str, str, tuple[str, ...], str, str]]:
    """Return the rows about metrics of a page: name, type, labels, unit, meaning."""
    found = re.findall(rf"^\| `({METRIC})` \|(.*)\|(.*)\|(.*)\|(.*)\|$", readme, re.MULTILINE)
    names = [name for name, *_ in found]
    for name in names:
        assert names.count(name) == 1, f"{name} is listed twice"
    return [
        (name, kind.strip(), tuple(label for label in re.split(r"[ ,]+", labels) if label), unit.strip(), what.strip())
        for name, kind, labels, unit, what in found
    ]


def families() -> list[tuple[str, str, tuple[str, ...]]]:
    """Return what a gateway can export: names as they are scraped, but for a histogram's endings; types; labels."""
    metrics = Metrics(GatewayId(0), 1, {})
    return [
        (family.name + ("_total" if family.type == "counter" else ""), family.type, tuple(vars(family)["_labelnames"]))
        for family in metrics.registry.collect()
    ]


def known_names() -> set[str]:
    """Return every series name the gateway can export."""
    endings = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + ending for name, kind, _ in families() for ending in endings.get(kind, ("",))}


def test_kubernetes_manifests_agree_with_their_cluster_file() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "kuberay" / "raycluster.yaml").read_text()))
    files = next(one for one in documents if one["kind"] == "ConfigMap")["data"]
    config = ClusterConfig.from_mapping(tomllib.loads(files["cluster.toml"]))
    ray = next(one for one in documents if one["kind"] == "RayCluster")["spec"]
    offered = {group["groupName"]: group for group in ray["workerGroupSpecs"]}
    for pool in config.pools:
        tags = json.loads(json.loads(offered[pool.name]["rayStartParams"]["resources"].strip("'")))
        assert tags.keys() == pool.resources.keys()
        assert offered[pool.name]["replicas"] >= pool.nodes
    gateways = offered["gateway"]
    tags = json.loads(json.loads(gateways["rayStartParams"]["resources"].strip("'")))
    assert tags.keys() == config.gateway.resources.keys()
    (container,) = gateways["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {config.gateway.http_port, config.gateway.grpc_port} == set(ports.values())
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/live", "port": "http"}
    assert gateways["template"]["spec"]["terminationGracePeriodSeconds"] > config.cluster.drain_s


def test_no_secret_of_the_kubernetes_manifests_is_in_a_config_map() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "kuberay" / "raycluster.yaml").read_text()))
    assert [one for one in documents if one["kind"] == "Secret"] == []  # its values would be everybody's
    files = next(one for one in documents if one["kind"] == "ConfigMap")["data"]
    config = ClusterConfig.from_mapping(tomllib.loads(files["cluster.toml"]))
    named = {config.cluster.secret, *(key for tenant in config.tenants for key in tenant.keys)}
    making = re.findall(r"--from-literal=(\w+)=", (FOLDER / "kuberay" / "raycluster.yaml").read_text())
    assert named == {f"env:{name}" for name in making}
    # Every process looks for them on its own host.
    ray = next(one for one in documents if one["kind"] == "RayCluster")["spec"]
    groups = [ray["headGroupSpec"], *ray["workerGroupSpecs"]]
    found = [group["template"]["spec"]["containers"][0]["envFrom"] for group in groups]
    assert found == [[{"secretRef": {"name": "weft-secrets"}}]] * 4
