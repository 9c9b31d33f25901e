"""Cluster files as they are written: what is read again is what was written, and only what differs is said."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.cluster_file import FOLDER, read_cluster
from orchestrator.cli.cluster_text import cluster_text
from orchestrator.core.config import ClusterConfig, ModelConfig, PoolConfig
from orchestrator.core.types import CostProfile, PoolKind

SMALL = ClusterConfig(pools=(PoolConfig(name="workers", kind=PoolKind.AGGREGATED),))


def read_back(text: str) -> ClusterConfig:
    return ClusterConfig.from_mapping(tomllib.loads(text))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.toml")), ids=lambda path: path.name)
def test_every_shipped_cluster_is_written_as_it_is_read(path: Path) -> None:
    config = read_cluster(path)
    assert read_back(cluster_text(config, ["A cluster."], {})) == config


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert cluster_text(SMALL, [], {}) == '\n[[pools]]\nname = "workers"\nkind = "aggregated"\n'
    # A table of its own only where something in it differs.
    pool = replace(SMALL.pools[0], nodes=3, profile=CostProfile(step_s=1e-05, batch_tokens=(1, 2), batch_s=(0.5, 1.0)))
    assert cluster_text(replace(SMALL, pools=(pool,)), [], {}).splitlines()[2:] == [
        'name = "workers"',
        'kind = "aggregated"',
        "nodes = 3",
        "",
        "[pools.profile]",
        "step_s = 1e-05",
        "batch_tokens = [1, 2]",
        "batch_s = [0.5, 1.0]",
    ]


def test_comments_stand_at_the_top_and_notes_under_their_heading() -> None:
    config = replace(SMALL, models={"default": ModelConfig(shape="kimi-k2")})
    lines = cluster_text(
        config, ["One.", "", "Two."], {"models.default": "Which model.", "pools": "What it runs on."}
    ).splitlines()
    assert lines[:4] == ["# One.", "#", "# Two.", ""]
    assert lines[lines.index("[models.default]") + 1] == "# Which model."
    assert lines[lines.index("[[pools]]") + 1] == "# What it runs on."


def test_several_models_and_pools_keep_their_names_and_order() -> None:
    models = {"default": ModelConfig(), "Qwen/Qwen3 8B": ModelConfig(aliases=("a", "b*")), "x_1-y": ModelConfig(path="m")}
    pools = tuple(
        PoolConfig(name=f"p{place}", kind=PoolKind.AGGREGATED, model=model, resources={"nvl72": 1.0, "a b": 0.5})
        for place, model in enumerate(models)
    )
    config = read_back(cluster_text(ClusterConfig(models=models, pools=pools), [], {}))
    assert config == ClusterConfig(models=models, pools=pools)
    assert list(config.models) == list(models)


@pytest.mark.parametrize(
    "path", ['quo"te', "back\\slash", "tab\tline\nend", "München", "模型", "emoji \N{PACKAGE}", "bell\x07delete\x7f"]
)
def test_any_path_is_written_so_that_it_can_be_read(path: str) -> None:
    config = replace(SMALL, models={"default": ModelConfig(path=path)})
    assert read_back(cluster_text(config, [], {})) == config


def test_a_comment_of_several_lines_stays_a_comment() -> None:
    assert read_back(cluster_text(SMALL, ["Found by\nweft plan --trace 'a\r\nb'", "red \x1b[31m text"], {})) == SMALL


def test_canary_a_field_that_is_lost_would_be_noticed() -> None:
    text = cluster_text(replace(SMALL, models={"default": ModelConfig(path="m")}), [], {})
    changed: dict[str, Any] = tomllib.loads(text.replace('path = "m"', ""))
    assert ClusterConfig.from_mapping(changed) != read_back(text)
