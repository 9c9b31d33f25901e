"""Words of the cache API as messages have them, and back: for the gateways that answer and for the client that asks."""

from orchestrator.core.hints import Outcome
from orchestrator.core.types import Tier
from orchestrator.wire import cache_pb2

TIERS = {cache_pb2.TIER_HBM: Tier.HBM, cache_pb2.TIER_CPU: Tier.CPU, cache_pb2.TIER_CMX: Tier.CMX}
TIERS_TOLD = {tier: number for number, tier in TIERS.items()}
OUTCOMES = {
    cache_pb2.OUTCOME_APPLIED: Outcome.APPLIED,
    cache_pb2.OUTCOME_CLIPPED: Outcome.CLIPPED,
    cache_pb2.OUTCOME_DEFERRED: Outcome.DEFERRED,
    cache_pb2.OUTCOME_DUPLICATE: Outcome.DUPLICATE,
    cache_pb2.OUTCOME_REJECTED: Outcome.REJECTED,
    cache_pb2.OUTCOME_MISSING: Outcome.MISSING,
    cache_pb2.OUTCOME_UNSUPPORTED: Outcome.UNSUPPORTED,
}
OUTCOMES_TOLD = {outcome: number for number, outcome in OUTCOMES.items()}
