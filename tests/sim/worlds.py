"""Small clusters and random agents' traces for tests of the simulator."""

from dataclasses import replace
from random import Random

from orchestrator.core.config import (
    CachePolicy,
    ClusterConfig,
    EngineConfig,
    GatewayConfig,
    LimitsConfig,
    PoolConfig,
    RouterConfig,
    RouterPolicy,
    SchedulerConfig,
    SpeculationConfig,
    StoreConfig,
)
from orchestrator.core.types import CostProfile, PoolKind, PoolName
from orchestrator.profiles.resolve import Below, Resolved
from orchestrator.traces import TracedTurn

BLOCK_TOKENS = 16
BLOCK_BYTES = 1024
#: Two nodes a host; a block comes from its memory in 10 us, from `cmx` in 100 us.
BELOW = Below(
    2, cpu_bytes_per_s=1e8, cpu_latency_s=1e-5, cmx_bytes_per_s=1e7, cmx_latency_s=1e-3,
    block_bytes=BLOCK_BYTES, pool_block_bytes=BLOCK_BYTES,
)  # fmt: skip
AFFINE = CostProfile(0.005, 2e-5, 2e-10, 2e-5, 2e-8, fetch_bytes_per_s=1e9)
CURVED = replace(AFFINE, prefill_token_s=0.0, batch_tokens=(1, 16, 512), batch_s=(0.004, 0.006, 0.02))
#: Attention becomes the longer half at a context of some thousand tokens: stretches of steps have a bend in them.
OVERLAPPING = replace(CURVED, context_token_s=1e-6, overlap=0.9)
SPECULATING = replace(OVERLAPPING, pass_tokens=4, tokens_per_pass=2.3)


def cluster(
    kinds: dict[PoolKind, int],
    profile: CostProfile = AFFINE,
    blocks: int = 512,
    gateways: int = 1,
    policy: RouterPolicy = RouterPolicy.PREDICTED_TIME,
    store: StoreConfig | None = None,
    cache: CachePolicy = CachePolicy.VALUE,
    speculation: SpeculationConfig | None = None,
) -> Resolved:
    """Return a cluster with one pool of each kind; `store` is what each of its hosts has below its nodes' memory."""
    drafts = speculation or SpeculationConfig()
    engine = EngineConfig(name="profiled", block_tokens=BLOCK_TOKENS, blocks=blocks, speculation=drafts)
    scheduler = SchedulerConfig(step_tokens_max=512, sequences_max=32, cache=cache)
    pools = tuple(
        PoolConfig(kind.value, kind, nodes=count, engine=engine, scheduler=scheduler, profile=profile)
        for kind, count in kinds.items()
    )
    router = RouterConfig(policy=policy)
    limits = LimitsConfig(waiting_s_max=500.0, request_s_max=500.0)
    config = ClusterConfig(gateway=GatewayConfig(count=gateways), limits=limits, router=router, pools=pools, store=store)
    return Resolved(config, {}, {PoolName(pool.name): BELOW for pool in pools} if store is not None else {})


def below(blocks: int, cmx: bool = False) -> StoreConfig:
    """Return a store with room for so many blocks in `cpu`."""
    return StoreConfig(cpu_bytes=blocks * BLOCK_BYTES, cmx="file:///simulated" if cmx else "", segment_blocks=4, detached_s=0.5)


def agents(count: int, turns: int, seed: int, context_tokens: int = 2000, seams: float = 0.1) -> list[TracedTurn]:
    """Return sessions that grow, share their first blocks, and start over now and then."""
    random = Random(seed)
    made: list[TracedTurn] = []
    names = 1_000
    for session in range(count):
        at_s, chain, tokens = random.uniform(0.0, 5.0), list(range(random.randrange(1, 12))), 0
        before: tuple[int, ...] = ()
        for _ in range(turns):
            seam = bool(before) and random.random() < seams
            tokens = len(chain[:8]) * BLOCK_TOKENS if seam else max(tokens, len(chain) * BLOCK_TOKENS)
            chain = chain[:8] if seam else chain
            tokens += random.randrange(1, context_tokens)
            while len(chain) < tokens // BLOCK_TOKENS:
                names += 1
                chain.append(names)
            runs = tuple((name, 1) for name in chain[: tokens // BLOCK_TOKENS])
            output = random.choice((1, 2, 17, random.randrange(1, 400)))
            turn = TracedTurn(
                len(made), f"s{session}", "main", at_s, before, random.uniform(0.0, 3.0), tokens, output, BLOCK_TOKENS, runs,
                tenant=("", "a", "b")[session % 3], seam=seam,
            )  # fmt: skip
            made.append(turn)
            before = (turn.id,)
            tokens += output
    return made
