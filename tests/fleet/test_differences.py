"""What a changed cluster file takes: sizes, restarts of some groups, or a new cluster."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.config import ClusterConfig, ClusterSettings, ModelConfig, RouterConfig, StoreConfig, TenantConfig
from orchestrator.fleet.differences import changes_between
from tests.fleet.clusters import small


def with_pool(config: ClusterConfig, index: int, **changes: Any) -> ClusterConfig:
    pools = list(config.pools)
    pools[index] = replace(pools[index], **changes)
    return replace(config, pools=tuple(pools))


def scheduler(config: ClusterConfig, **changes: Any) -> Any:
    return replace(config.pools[1].scheduler, **changes)


BASE = small()


@pytest.mark.parametrize(
    ("given", "told", "restarts"),
    [
        (replace(BASE, router=RouterConfig(seed=3)), ["router.seed 0 -> 3"], ("gateways",)),
        (
            replace(BASE, cluster=ClusterSettings(journal="/j")),
            ["cluster.journal '' -> '/j'"],
            ("prefill", "decode", "gateways"),
        ),
        (
            with_pool(BASE, 1, scheduler=scheduler(BASE, waiting_max=5)),
            ["pools[1].scheduler.waiting_max 1024 -> 5"],
            ("decode",),
        ),
        (with_pool(BASE, 0, resources={"nvl72": 1.0}), ["pools[0].resources {} -> {'nvl72': 1.0}"], ("prefill",)),
        (replace(BASE, models={"default": ModelConfig(aliases=("a",))}), ["models.default.aliases [] -> ['a']"], ("gateways",)),
        (
            replace(BASE, models={"default": ModelConfig(tool_parser="none")}),
            ["models.default.tool_parser 'auto' -> 'none'"],
            ("gateways",),
        ),
        (
            replace(BASE, tenants=(TenantConfig("t", ("sk-hidden",)),)),
            ["tenants (changed)"],
            ("gateways",),
        ),
    ],
)
def test_what_restarts_apply(given: ClusterConfig, told: list[str], restarts: tuple[str, ...]) -> None:
    changes = changes_between(BASE, given)
    assert [str(one) for one in changes.differences] == told
    assert changes.restarts == restarts
    assert changes.fixed == ()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (replace(BASE, cluster=ClusterSettings(secret="hidden")), "cluster.secret (changed)"),
        (replace(BASE, models={"default": ModelConfig(path="/other")}), "models.default.path '' -> '/other'"),
        (replace(BASE, store=StoreConfig(cpu_bytes=1)), "store None -> "),
        (with_pool(BASE, 1, name="more"), "pools ['prefill', 'decode'] -> ['prefill', 'more']"),
        (with_pool(BASE, 0, kind=BASE.pools[1].kind), "pools[0].kind"),
        (
            with_pool(BASE, 1, engine=replace(BASE.pools[1].engine, context_tokens_max=9)),
            None,
        ),
    ],
)
def test_what_no_running_cluster_can_take(given: ClusterConfig, told: str | None) -> None:
    fixed = [str(one) for one in changes_between(BASE, given).fixed]
    assert len(fixed) == (told is not None)
    assert told is None or fixed[0].startswith(told)


def test_block_sizes_are_fixed_in_every_pool() -> None:
    given = replace(BASE, pools=tuple(replace(pool, engine=replace(pool.engine, block_tokens=32)) for pool in BASE.pools))
    fixed = [one.where for one in changes_between(BASE, given).fixed]
    assert fixed == ["pools[0].engine.block_tokens", "pools[1].engine.block_tokens"]


def test_sizes_are_no_differences_but_are_told_as_they_should_be() -> None:
    changes = changes_between(BASE, small(decode=7, gateways=3))
    assert changes.differences == ()
    assert changes.sizes == {"prefill": 1, "decode": 7, "gateways": 3}
