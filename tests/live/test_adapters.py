"""LoRA adapters through a live gateway: asked for by name as any model, with KV of their own wherever that is kept."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from orchestrator.core.config import AdapterConfig, ClusterConfig, ClusterSettings, ModelConfig, StoreConfig
from orchestrator.core.types import CostProfile, GatewayId, PoolName
from orchestrator.fleet.actors import fingerprints_of
from orchestrator.live.front import Front, HostStore, Membership, NodePlace
from tests.adapters import adapted_oracle, write_adapter
from tests.builders import SECRET
from tests.live.serving import Cluster, cluster, run, split, together
from tests.oracle import Oracle, oracle
from tests.workers.conductor import prompts_of
from workers.engines.checkpoint import create_checkpoint

OUTPUT_TOKENS = 24
#: Prompts of each model, and how long they are.
PROMPTS = 6
LENGTHS = [5, 40, 70, 130, 200, 260, 300, 90]
#: What a prompt is expected to cost: more than loading it.
COSTLY = CostProfile(prefill_token_s=0.01)
Talk = Callable[[Cluster, httpx.AsyncClient, AsyncOpenAI], Awaitable[None]]


@dataclass(frozen=True)
class Adapted:
    """A checkpoint with two adapters, and what each of the three names writes after some prompts, which are the same for all."""

    path: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    #: By name, the text after each prompt.
    texts: dict[str, list[str]]

    def within(self, config: ClusterConfig) -> ClusterConfig:
        """Return a cluster that serves them."""
        adapters = {name: AdapterConfig(str(path)) for name, path in self.adapters.items()}
        adapters["sql"] = replace(adapters["sql"], aliases=("queries",))
        models = {"default": ModelConfig(path=str(self.path), aliases=("base",), adapters=adapters)}
        gateway = replace(config.gateway, http_port=0, grpc_port=0)
        return replace(config, cluster=ClusterSettings(secret=SECRET), models=models, gateway=gateway)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folder = tmp_path_factory.mktemp("adapted")
    path = folder / "model"
    create_checkpoint(path, request.param, 11, layers=2)
    adapters = {name: write_adapter(folder / name, path, seed) for seed, name in enumerate(("sql", "prose"))}
    oracles: dict[str, Oracle] = {name: adapted_oracle(path, adapter) for name, adapter in adapters.items()}
    oracles["default"] = oracle(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    found = {name: [one(prompt, OUTPUT_TOKENS) for prompt in prompts_of(6, LENGTHS)] for name, one in oracles.items()}
    decided = [number for number in range(len(LENGTHS)) if all(one[number] is not None for one in found.values())]
    assert len(decided) >= PROMPTS
    prompts = [prompts_of(6, LENGTHS)[number] for number in decided]
    texts = {name: [tokenizer.decode(tokens[number] or []) for number in decided] for name, tokens in found.items()}
    return Adapted(path, adapters, prompts, texts)


@asynccontextmanager
async def served(adapted: Adapted, config: ClusterConfig) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient, AsyncOpenAI]]:
    """Serve a cluster over HTTP; yields what serves, and two clients of it."""
    config = adapted.within(config)
    async with cluster(config, adapted.path) as nodes:
        pools = {node: PoolName(pool.name) for pool in config.pools for node in map(pool.node_id, range(pool.nodes))}
        known = fingerprints_of(config, "default")
        front = Front(config, GatewayId(1), "127.0.0.1", 0, {"default": adapted.path}, known, pools, nodes.failures.append)
        url = (await front.start()).url
        try:
            places = tuple(NodePlace(node, pools[node], address) for node, address in nodes.addresses.items())
            stores = (HostStore(nodes.place.id, nodes.place.address),) if nodes.place is not None else ()
            await front.set_members(Membership(1, places, {GatewayId(1): url}, stores))
            async with (
                httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http,
                AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
            ):
                while (await http.get("/ready")).status_code != httpx.codes.OK:
                    pass
                yield nodes, http, client
        finally:
            await front.stop()


async def complete(client: AsyncOpenAI, model: str, prompt: list[int], tokens: int = OUTPUT_TOKENS) -> tuple[str, int]:
    """Return what a model writes, and how many of the prompt's tokens were found in a cache."""
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0


def sized(config: ClusterConfig, blocks: int) -> ClusterConfig:
    return replace(config, pools=tuple(replace(one, engine=replace(one.engine, blocks=blocks)) for one in config.pools))


def play(adapted: Adapted, config: ClusterConfig, talk: Talk) -> None:
    async def scenario() -> None:
        async with served(adapted, config) as (nodes, http, client):
            await talk(nodes, http, client)

    run(scenario, 300)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["aggregated", "disaggregated"])
def test_all_names_answer_in_one_batch_and_find_their_own_prefixes_alone(adapted: Adapted, layout: str) -> None:
    asked = [(model, number) for number in range(len(adapted.prompts)) for model in adapted.texts]

    async def talk(nodes: Cluster, http: httpx.AsyncClient, client: AsyncOpenAI) -> None:
        first = await asyncio.gather(*[complete(client, model, adapted.prompts[number]) for model, number in asked])
        assert [text for text, _ in first] == [adapted.texts[model][number] for model, number in asked]
        assert [cached for _, cached in first] == [0] * len(asked), "the same prompt of another name was found"
        again = await asyncio.gather(*[complete(client, model, adapted.prompts[number]) for model, number in asked])
        assert [text for text, _ in again] == [text for text, _ in first]
        full = [(len(adapted.prompts[number]) - 1) // 16 * 16 for _, number in asked]
        assert [cached for _, cached in again] == full
        assert (len(nodes.observed.moves) > 0) == (layout == "disaggregated")

    config = together("eager") if layout == "aggregated" else split("eager")
    play(adapted, sized(config, 512), talk)


@pytest.mark.slow
def test_tiers_below_keep_adapters_apart(adapted: Adapted) -> None:
    config = replace(sized(together("eager", profile=COSTLY), 40), store=StoreConfig(cpu_bytes=1 << 26))
    prompt = adapted.prompts[-2]
    full = (len(prompt) - 1) // 16 * 16

    async def talk(nodes: Cluster, http: httpx.AsyncClient, client: AsyncOpenAI) -> None:
        assert await complete(client, "sql", prompt) == (adapted.texts["sql"][-2], 0)
        while (await http.get("/status")).json()["stores"][0]["slots"]["cached"] < full // 16:
            pass
        # Other prompts push it out of the node, whose pool holds hardly more than one of them.
        for other in prompts_of(9, [300] * 4):
            await complete(client, "sql", other, 1)
        for name, cached in (("prose", 0), ("default", 0), ("sql", full)):
            assert await complete(client, name, prompt) == (adapted.texts[name][-2], cached)
        families = text_string_to_metric_families((await http.get("/metrics")).text)
        tiers = [one for family in families for one in family.samples if one.name == "weft_cached_tokens_total"]
        assert {one.labels["tier"]: one.value for one in tiers if one.value} == {"cpu": full}

    play(adapted, config, talk)


@pytest.mark.slow
def test_clients_see_adapters_as_models_of_their_base(adapted: Adapted) -> None:
    async def talk(nodes: Cluster, http: httpx.AsyncClient, client: AsyncOpenAI) -> None:
        cards = {card.id: card.to_dict() for card in (await client.models.list()).data}
        assert {name: (card["root"], card["parent"]) for name, card in cards.items()} == {
            "default": ("default", None),
            "base": ("default", None),
            "sql": ("default", "default"),
            "queries": ("default", "default"),
            "prose": ("default", "default"),
        }
        assert (await client.models.retrieve("sql")).id == "sql"
        with pytest.raises(NotFoundError):
            await complete(client, "poetry", [1, 2, 3])
        by_alias, _ = await complete(client, "queries", adapted.prompts[0])
        assert by_alias == adapted.texts["sql"][0]
        page = (await http.get("/metrics")).text
        assert 'model="sql"' in page
        assert 'model="queries"' not in page

    play(adapted, together("eager"), talk)
