"""Cluster files: what a good one becomes, and what a bad one is answered with."""

import pickle
from typing import Any

import pytest

from orchestrator.core.config import ClusterConfig, ConfigError, RouterPolicy, TenantConfig
from orchestrator.core.types import NodeId, PoolKind, ServiceClass

ADAPTER = {"path": "/adapters/a"}
POOL: dict[str, Any] = {"name": "all", "kind": "aggregated"}
BEATING: dict[str, Any] = {"name": "beating", "kind": "lpx", "profile": {"beat_s": 0.01}}


def problem(**file: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.from_mapping({"pools": [POOL], **file})
    return str(caught.value)


def test_defaults_make_a_cluster_of_one_pool() -> None:
    config = ClusterConfig.from_mapping({"pools": [POOL]})
    assert (config.pools[0].name, config.pools[0].kind, config.pools[0].model) == ("all", PoolKind.AGGREGATED, "default")
    assert config.router.policy is RouterPolicy.PREDICTED_TIME
    assert config.pools_of("default") == config.pools
    assert config.pools_of("other") == ()


def test_a_problem_is_the_same_in_a_process_that_is_told_of_it() -> None:
    told = pickle.loads(pickle.dumps(ConfigError("pools[0].name", "must not be empty")))
    assert (str(told), told.where, told.problem) == ("pools[0].name: must not be empty", "pools[0].name", "must not be empty")


def test_values_find_their_fields() -> None:
    config = ClusterConfig.from_mapping(
        {
            "cluster": {"name": "x", "drain_s": 5},
            "tenants": [{"name": "t", "keys": ["k"], "share": 2, "class_max": "standard"}],
            "router": {"policy": "dynamo", "disaggregation_tokens_min": 512},
            "trace": {"endpoint": "https://collector:4318", "sampled_share": 0.1},
            "models": {"default": {"aliases": ["gpt-*"]}},
            "pools": [{**POOL, "resources": {"nvl72": 1}, "profile": {"step_s": 1}, "engine": {"name": "profiled"}}],
        }
    )
    assert config.cluster.drain_s == 5.0
    assert config.tenants == (TenantConfig("t", ("k",), share=2.0, class_max=ServiceClass.STANDARD),)
    assert (config.router.policy, config.router.disaggregation_tokens_min) == (RouterPolicy.DYNAMO, 512)
    assert (config.trace.endpoint, config.trace.sampled_share) == ("https://collector:4318", 0.1)
    assert config.models["default"].aliases == ("gpt-*",)
    assert (dict(config.pools[0].resources), config.pools[0].profile.step_s) == ({"nvl72": 1.0}, 1.0)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"router": {"polcy": "x"}}, "router.polcy: unknown key; known here: policy, "),
        ({"router": {"policy": "x"}}, "router.policy: must be one of predicted-time, round-robin, "),
        ({"router": {"load_factor_max": 0.5}}, "router.load_factor_max: must be 1 or more, is 0.5"),
        ({"router": []}, "router: must be a table, is list"),
        ({"limits": {"waiting_max": 0}}, "limits.waiting_max: must be 1 or more, is 0"),
        ({"limits": {"waiting_max": True}}, "limits.waiting_max: must be int, is True"),
        ({"limits": {"waiting_max": 1.5}}, "limits.waiting_max: must be int, is 1.5"),
        ({"gateway": {"host": "0.0.0.0"}}, "gateway.host: 0.0.0.0 is not loopback, so at least one [[tenants]] table is needed"),
        ({"gateway": {"api_keys": []}}, "gateway.api_keys: is no more; write a table [[tenants]] with name = "),
        ({"trace": {"endpoint": "collector:4318"}}, "trace.endpoint: must be a URL (http://HOST:PORT), is 'collector:4318'"),
        ({"trace": {"endpoint": "http:///"}}, "trace.endpoint: must be a URL"),
        ({"trace": {"endpoint": "http://c/v1/traces"}}, "trace.endpoint: must be a base URL, to which /v1/traces is added"),
        ({"trace": {"sampled_share": 1.5}}, "trace.sampled_share: must be a share, 0 to 1, is 1.5"),
        ({"trace": {"service": ""}}, "trace.service: must not be empty"),
        ({"trace": {"spans_max": 0}}, "trace.spans_max: must be 1 or more, is 0"),
        ({"store": {"cpu_bytes": 0}}, "store.cpu_bytes: must be 1 or more, is 0"),
        ({"store": {"shares": {"default": 0}}}, "store.shares.default: must be 0.001 to 1e+06, is 0.0"),
        ({"store": {"shares": {"x": 1}}}, "store.shares.x: no [models.x] table; there are: default"),
        ({"store": {"cmx": "/srv"}}, "store.cmx: must be file:///FOLDER or s3://BUCKET/PREFIX, is '/srv'"),
        ({"store": {"cmx_bytes": -1}}, "store.cmx_bytes: must be 0 or more, is -1"),
        ({"store": {"segment_blocks": 2000}}, "store.segment_blocks: must be at most 1024, is 2000"),
        ({"store": {"moves_bytes_max": 0}}, "store.moves_bytes_max: must be 1 or more, is 0"),
        ({"store": {"move_s_max": 0}}, "store.move_s_max: must be over 0 seconds, is 0.0"),
        ({"store": {"leased_share_max": 2}}, "store.leased_share_max: must be a share, 0 to 1, is 2.0"),
        ({"store": {"cmx_bytes_per_s": 0}}, "store.cmx_bytes_per_s: must be over 0 bytes a second, is 0.0"),
        ({"store": {"cmx_latency_s": float("inf")}}, "store.cmx_latency_s: must be 0 or more seconds, is inf"),
        ({"tenants": [{"keys": ["k"]}]}, "tenants[0].name: is missing"),
        ({"tenants": [{"name": ""}]}, "tenants[0].name: must have 1 to 64 characters, has 0"),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "tenants[0].name: 'a' is used twice"),
        (
            {"tenants": [{"name": "a", "keys": ["sk"]}, {"name": "b", "keys": ["sk"]}]},
            "tenants[1].keys[0]: is a key of a already",
        ),
        (
            {"gateway": {"count": 3}, "tenants": [{"name": "a", "requests_max": 2}]},
            "tenants[0].requests_max: must be at least 1 for each of 3 gateways, is 2",
        ),
        (
            {"gateway": {"count": 3}, "limits": {"tenant_requests_max": 2}},
            "limits.tenant_requests_max: must be at least 1 for each of 3 gateways, is 2",
        ),
        ({"tenants": [{"name": "a", "share": 0}]}, "tenants[0].share: must be 0.001 to 1e+06, is 0.0"),
        ({"tenants": [{"name": "a", "share": float("nan")}]}, "tenants[0].share: must be 0.001 to 1e+06, is nan"),
        ({"tenants": [{"name": "a", "tokens_per_s": -1}]}, "tenants[0].tokens_per_s: must be 0 or more a second, is -1.0"),
        ({"tenants": [{"name": "a", "requests_max": -1}]}, "tenants[0].requests_max: must be 0 or more, is -1"),
        ({"tenants": [{"name": "a", "priority_max": 1 << 40}]}, "tenants[0].priority_max: must be -2147483647 to 2147483647"),
        (
            {"models": {"default": {"tool_parser": "x"}}},
            "models.default.tool_parser: must be one of "
            "auto, hermes, qwen3_coder, llama, pythonic, mistral, deepseek, kimi_k2, harmony, none",
        ),
        ({"models": {"default": {"adapters": {"a": {}}}}}, "models.default.adapters.a.path: is missing"),
        ({"models": {"default": {"adapters": {"a": {"path": ""}}}}}, "models.default.adapters.a.path: must not be empty"),
        ({"models": {"default": {"adapters": {"": ADAPTER}}}}, "models.default.adapters: an adapter's name must not be empty"),
        (
            {"models": {"default": {"adapters": {str(number): ADAPTER for number in range(257)}}}},
            "models.default.adapters: must be 256 at most, are 257",
        ),
        ({"models": {"default": {"adapter_rank_max": 513}}}, "models.default.adapter_rank_max: must be 1 to 512, is 513"),
        (
            {"models": {"default": {"adapters": {"default": ADAPTER}}}},
            "models.default.adapters.default: [models.default] has that name already",
        ),
        (
            {"models": {"default": {"aliases": ["a"], "adapters": {"a": ADAPTER}}}},
            "models.default.adapters.a: is an alias already",
        ),
        (
            {
                "models": {"default": {"adapters": {"a": ADAPTER}}, "b": {"adapters": {"a": ADAPTER}}},
                "pools": [POOL, {**POOL, "name": "other", "model": "b"}],
            },
            "models.b.adapters.a: an adapter of another model has that name already",
        ),
        (
            {
                "models": {"default": {"adapters": {"a": ADAPTER}}},
                "pools": [POOL, {"name": "p", "kind": "prefill"}, {"name": "l", "kind": "lpx", "profile": {"beat_s": 0.01}}],
            },
            "models.default.adapters: pool l is of kind lpx, whose engine keeps its beat for the model alone",
        ),
        (
            {"pools": [POOL, {**BEATING, "split": {"spare_slots": 1, "imbalance_max": 0}}]},
            "pools[1].split.spare_slots: must be 0 in a pool of kind lpx, whose experts stay where they are; is 1",
        ),
        (
            {"pools": [POOL, {**BEATING, "split": {}}]},
            "pools[1].split.imbalance_max: must be 0 in a pool of kind lpx, whose experts stay where they are; is 0.1",
        ),
        (
            {"pools": [POOL, {**BEATING, "beat": {"ffn_cores": [1]}}]},
            "pools[1].beat.ffn_cores: is for pools with a [pools.split] table: others have no FFN ranks",
        ),
        (
            {"pools": [POOL, {**BEATING, "beat": {"ffn_cores": [1, 1]}}]},
            "pools[1].beat.ffn_cores: must be different numbers from 0 on, are [1, 1]",
        ),
        (
            {"pools": [POOL, {**BEATING, "split": {"imbalance_max": 0}, "engine": {"name": "profiled"}}]},
            'pools[1].split: needs engine.name = "eager": others have no halves',
        ),
        ({"pools": []}, "pools: at least one [[pools]] table is needed"),
        ({"pools": {}}, "pools: must be a list, is dict"),
        ({"pools": [POOL, POOL]}, "pools[0].name: 'all' is used twice"),
        ({"pools": [{**POOL, "model": "x"}]}, "pools[0].model: no [models.x] table; there are: default"),
        ({"pools": [{**POOL, "kind": "prefill"}]}, "models.default: no pool of kind decode or aggregated serves it"),
        ({"pools": [{**POOL, "engine": {"block_tokens": 0}}]}, "pools[0].engine.block_tokens: must be 1 or more tokens, is 0"),
        (
            {"pools": [POOL, {**POOL, "name": "b", "engine": {"block_tokens": 16}}]},
            "models.default: its pools differ in engine.block_tokens: 16, 64",
        ),
        (
            {"pools": [POOL, {**POOL, "name": "b", "engine": {"kv_format_stored": "fp8"}}]},
            "models.default: its pools differ in engine.kv_format_stored: fp8, plain",
        ),
        (
            {"pools": [{**POOL, "engine": {"kv_format_stored": "int8"}}]},
            "pools[0].engine.kv_format_stored: must be one of plain, fp8, nvfp4, is 'int8'",
        ),
        (
            {"pools": [POOL, {**POOL, "name": "b", "engine": {"weights": "fp8"}}]},
            "models.default: its pools differ in engine.weights: auto, fp8",
        ),
        (
            {"pools": [{**POOL, "engine": {"weights": "fp8", "name": "profiled"}}]},
            "pools[0].engine.weights: must be auto with the profiled engine, which has none, is fp8",
        ),
        (
            {"pools": [{**POOL, "nodes_per_process": 2}]},
            'pools[0].nodes_per_process: more than 1 needs engine.name = "profiled"',
        ),
        # Counts that would fill a memory before anything else could be noticed.
        ({"pools": [{**POOL, "nodes": 100_000_000}]}, "pools[0].nodes: must be 1 to 16384, is 100000000"),
        ({"pools": [{**POOL, "engine": {"blocks": 10**9}}]}, "pools[0].engine.blocks: must be at most 134217728, is 1000000000"),
        ({"gateway": {"count": 10**8}}, "gateway.count: must be 1 to 1024, is 100000000"),
        ({"limits": {"waiting_max": 10**18}}, "limits.waiting_max: must be at most 2^53, is 1000000000000000000"),
        ({"limits": {"waiting_s_max": 10**400}}, f"limits.waiting_s_max: must be at most 2^53, is {10**59}..."),
        # More digits than Python writes out, as hexadecimal numbers in a file may have.
        ({"limits": {"waiting_max": 1 << 20_000}}, "limits.waiting_max: must be at most 2^53, is too long to be shown (int)"),
        ({"router": {"policy": 1 << 20_000}}, "router.policy: must be one of predicted-time, "),
    ],
)
def test_a_bad_file_is_answered_with_the_field(file: dict[str, Any], message: str) -> None:
    assert problem(**file).startswith(message)


CURVE = {"batch_tokens": [1, 8], "batch_s": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"step_s": -1.0}, "step_s: must be 0 or more seconds, is -1.0"),
        ({"step_s": float("nan")}, "step_s: must be 0 or more seconds, is nan"),
        ({"context_token_s": float("inf")}, "context_token_s: must be 0 or more seconds, is inf"),
        ({"fetch_latency_s": -1}, "fetch_latency_s: must be 0 or more seconds, is -1.0"),
        ({"fetch_bytes_per_s": 0}, "fetch_bytes_per_s: must be over 0 bytes a second, is 0.0"),
        ({"overlap": 2.0}, "overlap: must be a share, 0 to 1, is 2.0"),
        ({"pass_tokens": 0}, "pass_tokens: must be 1 or more, is 0"),
        ({"tokens_per_pass": 0}, "tokens_per_pass: must be 1 or more, is 0.0"),
        ({"batch_tokens": [1]}, "batch_s: must have as many entries as batch_tokens (1), has 0"),
        ({**CURVE, "batch_tokens": [1, 1]}, "batch_tokens: must be 1 or more and ascend, has 1 after 1"),
        ({**CURVE, "batch_tokens": [8, 1]}, "batch_tokens: must be 1 or more and ascend, has 1 after 8"),
        ({**CURVE, "batch_tokens": [0, 1]}, "batch_tokens: must be 1 or more and ascend, has 0 after 0"),
        ({**CURVE, "batch_s": [0.1, float("nan")]}, "batch_s: must be 0 or more seconds, step_s included, has nan"),
        ({**CURVE, "batch_s": [-0.1, 0.1], "step_s": 0.05}, "batch_s: must be 0 or more seconds, step_s included, has -0.1"),
        ({**CURVE, "batch_s": [0.2, 0.1]}, "batch_s: must not fall at its end, has [0.2, 0.1]"),
    ],
)
def test_a_profile_of_steps_that_cannot_be_is_answered_with_its_field(profile: dict[str, Any], message: str) -> None:
    assert problem(pools=[{**POOL, "profile": profile}]) == f"pools[0].profile.{message}"


def test_speculation_is_off_unless_asked_for_and_refused_where_it_means_nothing() -> None:
    [pool] = ClusterConfig.from_mapping({"pools": [POOL]}).pools
    assert pool.engine.speculation.tokens_max == 0
    asked = {"method": "prompt_lookup", "draft_tokens_max": 5}
    [pool] = ClusterConfig.from_mapping({"pools": [{**POOL, "engine": {"speculation": asked}}]}).pools
    assert pool.engine.speculation.tokens_max == 5
    for values, message in (
        ({"method": "guess"}, "method: must be one of off, prompt_lookup, draft_model, is 'guess'"),
        ({"draft_tokens_max": 0}, "draft_tokens_max: must be 1 to 64 tokens, is 0"),
        ({"draft_tokens_max": 65}, "draft_tokens_max: must be 1 to 64 tokens, is 65"),
        ({"acceptance": 1.0}, "acceptance: must be in [0, 1), is 1.0"),
        (
            {"method": "draft_model"},
            "draft_model: must name a checkpoint directory (or draft_pool a pool): method is draft_model",
        ),
        ({"draft_pool": "drafts"}, "draft_pool: is for method draft_model, method is off"),
        ({"draft_model": "small"}, "draft_model: is for method draft_model, method is off"),
        ({"draft_context_tokens_max": 127}, "draft_context_tokens_max: must be 128 or more tokens, is 127"),
        ({"draft_sequences_max": -1}, "draft_sequences_max: must be 0 or more, is -1"),
    ):
        assert problem(pools=[{**POOL, "engine": {"speculation": values}}]) == f"pools[0].engine.speculation.{message}"


DRAFTED: dict[str, Any] = {**POOL, "engine": {"speculation": {"method": "draft_model", "draft_pool": "drafts"}}}
DRAFTING: dict[str, Any] = {"name": "drafts", "kind": "lpx", "drafter": {"model": "small"}}


def test_a_pool_that_drafts_serves_no_requests() -> None:
    config = ClusterConfig.from_mapping({"pools": [DRAFTED, DRAFTING]})
    drafted, drafting = config.pools
    assert (config.serving_pools, config.pools_of("default")) == ((drafted,), (drafted,))
    assert drafting.drafter is not None
    assert (drafting.drafter.model, drafting.drafter.sequences_max) == ("small", 16)
    sizes = {"blocks": 1, "block_tokens": 1, "block_bytes": 1, "context_tokens_max": 1}
    spec = drafted.node_spec(NodeId("all-0"), 1, drafted.profile, **sizes)
    assert (spec.draft_model, spec.draft_tokens_max) == (True, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "decode"}, "drafter: is for pools of kind lpx, this one is of kind decode"),
        ({"drafter": {"model": ""}}, "drafter.model: must name a checkpoint directory"),
        ({"drafter": {}}, "drafter.model: is missing"),
        (
            {"drafter": {"model": "s", "context_tokens_max": 100}},
            "drafter.context_tokens_max: must be 128 to 65536 tokens, is 100",
        ),
        ({"drafter": {"model": "s", "sequences_max": 0}}, "drafter.sequences_max: must be 1 to 4096, is 0"),
        ({"split": {}}, "split: is for pools that serve requests; this one drafts, and a draft model is whole"),
        (
            {"profile": {"beat_s": 0.01}},
            "profile: is for pools that serve requests, this one drafts for others; what a pass takes is profile.draft_step_s "
            "of the pools that it drafts for",
        ),
        ({"scheduler": {"sequences_max": 4}}, "scheduler: is for pools that serve requests, this one drafts for others"),
        ({"engine": {"name": "profiled"}}, "engine.name: is for pools that serve requests, this one drafts for others"),
        ({"engine": {"blocks": 5}}, "engine.blocks: is for pools that serve requests, this one drafts for others"),
        ({"beat": {"spin_s": 0.001}}, "beat.spin_s: is for pools that serve requests, this one drafts for others"),
        ({"hardware": {"chip": "lp30"}}, "hardware: is for pools that serve requests, this one drafts for others"),
    ],
)
def test_a_pool_that_drafts_is_told_nothing_that_it_would_not_heed(changes: dict[str, Any], message: str) -> None:
    assert problem(pools=[DRAFTED, {**DRAFTING, **changes}]) == f"pools[1].{message}"


def test_who_is_drafted_for_names_a_pool_that_drafts_for_its_model() -> None:
    where = "pools[0].engine.speculation.draft_pool"
    nobody = f"{where}: no pool 'drafts' has a [pools.drafter] table; there are: none"
    assert problem(pools=[DRAFTED]) == nobody
    assert problem(pools=[DRAFTED, {"name": "drafts", "kind": "decode"}]) == nobody
    idle = "pools[1].drafter: no pool names this one in engine.speculation.draft_pool"
    assert problem(pools=[POOL, DRAFTING]) == idle
    assert problem(pools=[DRAFTED, {**DRAFTING, "model": "b"}], models={"default": {}, "b": {}}) == (
        f"{where}: pool drafts drafts for model b, this one is of model default"
    )
    for more, message in (
        ({"draft_model": "small"}, "draft_pool: stands instead of draft_model, which is given as well"),
        (
            {"draft_context_tokens_max": 256},
            "draft_context_tokens_max: is for draft_model; pool drafts has drafter.context_tokens_max",
        ),
        ({"draft_sequences_max": 4}, "draft_sequences_max: is for draft_model; pool drafts has drafter.sequences_max"),
    ):
        drafted = {**POOL, "engine": {"speculation": {**DRAFTED["engine"]["speculation"], **more}}}
        assert problem(pools=[drafted, DRAFTING]) == f"pools[0].engine.speculation.{message}"
    profiled = {**POOL, "engine": {**DRAFTED["engine"], "name": "profiled"}}
    assert problem(pools=[profiled, DRAFTING]) == (
        'pools[0].engine.speculation.draft_pool: needs name = "eager": engine profiled draws what is accepted'
    )
    prefill = {**DRAFTED, "name": "prefill", "kind": "prefill"}
    assert problem(pools=[POOL, prefill, DRAFTING]) == (
        "pools[1].engine.speculation.method: draft_model is for pools that generate; prefill nodes draft nothing"
    )


def test_a_model_is_not_served_by_a_pool_that_drafts_alone() -> None:
    drafting = {**DRAFTING, "model": "b"}
    drafted = {**DRAFTED, "kind": "lpx", "model": "b", "profile": {"beat_s": 0.01}}
    models = {"default": {}, "b": {}}
    assert problem(pools=[POOL, drafted, drafting], models=models) == (
        "pools[1].engine.speculation.method: must be off in a pool of kind lpx: each beat brings one token"
    )


@pytest.mark.parametrize("counted", [{"profile": {"pass_tokens": 3}}, {"hardware": {"chip": "vr200", "draft_tokens": 2}}])
def test_drafts_are_not_counted_twice(counted: dict[str, Any]) -> None:
    pool = {**POOL, "engine": {"speculation": {"method": "prompt_lookup"}}, **counted}
    where = "pools[0].engine.speculation.method"
    assert problem(pools=[pool]) == (
        f"{where}: must be off where hardware.draft_tokens or profile.pass_tokens count drafted tokens already"
    )


def test_a_draft_model_is_for_pools_that_generate() -> None:
    engine = {"speculation": {"method": "draft_model", "draft_model": "small"}}
    pools = [{**POOL, "kind": "prefill", "engine": engine}, {**POOL, "name": "decode", "kind": "decode"}]
    expected = "pools[0].engine.speculation.method: draft_model is for pools that generate; prefill nodes draft nothing"
    assert problem(pools=pools) == expected
    pools[0]["engine"] = {}
    pools[1]["engine"] = engine
    [_, pool] = ClusterConfig.from_mapping({"pools": pools}).pools
    sizes = {"blocks": 1, "block_tokens": 1, "block_bytes": 1, "context_tokens_max": 1}
    assert pool.node_spec(NodeId("decode-0"), 1, pool.profile, **sizes).draft_model


def test_profiles_may_be_all_zero_and_what_a_point_of_a_curve_lacks_may_be_in_every_step() -> None:
    for profile in ({}, {"step_s": 0.0, "fetch_latency_s": 0}, {**CURVE, "batch_s": [-0.1, 0.1], "step_s": 0.1}):
        assert ClusterConfig.from_mapping({"pools": [{**POOL, "profile": profile}]}).pools
