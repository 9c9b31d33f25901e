"""One kind of chip, a node made of it, and what a steady trace asks: what tests of the planner start from."""

from orchestrator.core.config import HardwareConfig
from orchestrator.core.types import CostProfile
from orchestrator.plan.demand import Demand, Held, Prompt
from orchestrator.plan.estimate import Sizing

SMALL = HardwareConfig(chip="small")
NODE = Sizing(
    profile=CostProfile(step_s=0.01, prefill_token_s=1e-4),
    kv_tokens=100_000,
    kv_token_bytes=100.0,
    usd_per_hour=2.0,
    kw=1.0,
    gpus=1.0,
)
#: A prompt takes a tenth of a second of one node; a hundred tokens a second keep one sequence of 1,000 tokens running.
DEMAND = Demand(
    requests=1000,
    duration_s=500.0,
    requests_per_s=2.0,
    output_tokens_per_s=100.0,
    context_tokens=1000.0,
    context_tokens_max=2000,
    arrival_scv=1.0,
    held=(Held(0.0, 0.0, 0.0, (Prompt(900.0, 0.0),)),),
)
