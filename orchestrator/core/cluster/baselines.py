"""The field's routing policies behind our interface, to be compared with in the same cluster and the same run.

All of them choose a generating node by one rule and, where prefill nodes exist, leave prompts with anything uncached to one of
those, chosen by the same rule. None of them fetches from a peer.
"""

from collections.abc import Callable, Sequence
from random import Random

from orchestrator.core.cluster.candidates import Candidate, Options, Placement, Router
from orchestrator.core.commands import Scores
from orchestrator.core.config import RouterConfig, RouterPolicy
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.core.types import Request

#: SGLang gateway's defaults: loads this far apart, absolutely and relatively, send requests to the idlest node.
SGLANG_BALANCE_ABSOLUTE = 64
SGLANG_BALANCE_RELATIVE = 1.5
#: Part of the prompt that a node must hold to be chosen for it.
SGLANG_CACHE_THRESHOLD = 0.3


#: Chooses one of several candidates; given the request, what may be chosen from, and the candidates in question.
Rule = Callable[[Request, Options, Sequence[Candidate]], Candidate]


def make_baseline(config: RouterConfig) -> Router:
    """Return the baseline that the cluster file names. Raises `KeyError` for our own policy."""
    rules: dict[RouterPolicy, Rule] = {
        RouterPolicy.ROUND_ROBIN: RoundRobin(),
        RouterPolicy.RANDOM: RandomNode(config.seed),
        RouterPolicy.POWER_OF_TWO: PowerOfTwo(config.seed),
        RouterPolicy.LEAST_LOADED: least_loaded,
        RouterPolicy.DYNAMO: Dynamo(config.seed),
        RouterPolicy.SGLANG: sglang,
    }
    return Baseline(config, rules[config.policy])


class Baseline:
    """Applies one rule to the nodes that generate, and to the prefill nodes for prompts with anything uncached."""

    __slots__ = ("_name", "_rule", "_uncached_tokens_min")

    def __init__(self, config: RouterConfig, rule: Rule) -> None:
        self._name = config.policy.value
        self._rule = rule
        self._uncached_tokens_min = config.disaggregation_tokens_min

    def place(self, request: Request, options: Options) -> Placement | None:
        """Return where a request goes; None only without candidates."""
        if not options.generators:
            return None
        generate = self._rule(request, options, options.generators)
        cached = cached_tokens(request, options, generate)
        prefill = None
        if options.prefillers and (generate.beats or request.prompt_tokens - cached >= self._least(generate)):
            prefill = self._rule(request, options, options.prefillers)
            cached = cached_tokens(request, options, prefill)
        scores = self._scores(request, options, prefill or generate, cached)
        return Placement(generate, prefill, None, 0, cached, scores)

    def _least(self, generate: Candidate) -> int:
        """Return the uncached tokens from which on the prefill pool is used; by default any uncached block."""
        least = self._uncached_tokens_min
        return generate.spec.block_tokens if least is None else least

    def _scores(self, request: Request, options: Options, computes: Candidate, cached: int) -> Scores:
        spec = computes.spec
        seconds = prompt_seconds(computes.profile, request.prompt_tokens - cached, cached, spec.step_tokens_max)
        compute_s = seconds * computes.load.cost_scale
        ready_s = computes.ready_s
        candidates = len(options.generators) + len(options.prefillers)
        ttft_s = ready_s + compute_s + computes.step_s
        return Scores(self._name, cached, ttft_s, queue_s=ready_s, compute_s=compute_s, candidates=candidates)


def cached_tokens(request: Request, options: Options, candidate: Candidate) -> int:
    """Return the prompt tokens that a node need not compute: all it holds but the last, which brings the first token."""
    return min(options.present[candidate.column] * candidate.spec.block_tokens, request.prompt_tokens - 1)


class RoundRobin:
    """One after the other; prefill and generating nodes each in their own order."""

    __slots__ = ("_turns",)

    def __init__(self) -> None:
        #: Requests so far, for nodes that generate and for those that do not.
        self._turns = {True: 0, False: 0}

    def __call__(self, request: Request, options: Options, candidates: Sequence[Candidate]) -> Candidate:
        generates = candidates[0].generates
        self._turns[generates] += 1
        return candidates[(self._turns[generates] - 1) % len(candidates)]


class RandomNode:
    """Any node, each as likely as the other."""

    __slots__ = ("_random",)

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def __call__(self, request: Request, options: Options, candidates: Sequence[Candidate]) -> Candidate:
        return self._random.choice(candidates)


class PowerOfTwo:
    """The one with fewer requests of two nodes drawn at random."""

    __slots__ = ("_random",)

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def __call__(self, request: Request, options: Options, candidates: Sequence[Candidate]) -> Candidate:
        return min(self._random.sample(candidates, min(2, len(candidates))), key=lambda candidate: candidate.requests)


def least_loaded(request: Request, options: Options, candidates: Sequence[Candidate]) -> Candidate:
    """Return the node with the fewest requests, the first of equals."""
    return min(candidates, key=lambda candidate: candidate.requests)


class Dynamo:
    """Dynamo's cost function with its defaults: blocks still to be prefilled, what is cached deducted, plus active blocks.

    cost = max(active_prefill_blocks + prompt_blocks - overlap_blocks, 0) + (active_blocks + prompt_blocks); least cost wins and
    equal ones are drawn from at random.
    """

    __slots__ = ("_random",)

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def __call__(self, request: Request, options: Options, candidates: Sequence[Candidate]) -> Candidate:
        costs = [self._cost(request, options, candidate) for candidate in candidates]
        least = min(costs)
        return self._random.choice([one for one, cost in zip(candidates, costs, strict=True) if cost == least])

    def _cost(self, request: Request, options: Options, candidate: Candidate) -> float:
        block_tokens = candidate.spec.block_tokens
        prompt_blocks = request.prompt_tokens / block_tokens
        prefill_blocks = candidate.uncomputed_tokens / block_tokens + prompt_blocks - options.present[candidate.column]
        active_blocks = candidate.prompts_tokens / block_tokens + prompt_blocks
        return max(prefill_blocks, 0.0) + active_blocks


def sglang(request: Request, options: Options, candidates: Sequence[Candidate]) -> Candidate:
    """Return a node by SGLang's cache-aware rule.

    If loads are far apart the idlest node; else the one that holds most of the prompt if that is enough of it; else the one
    whose cache is emptiest.
    """
    loads = [candidate.requests for candidate in candidates]
    most, least = max(loads), min(loads)
    if most - least > SGLANG_BALANCE_ABSOLUTE and most > SGLANG_BALANCE_RELATIVE * least:
        return least_loaded(request, options, candidates)
    best = max(candidates, key=lambda candidate: options.present[candidate.column])
    if options.present[best.column] >= SGLANG_CACHE_THRESHOLD * max(1, len(request.hashes)):
        return best
    return min(candidates, key=lambda candidate: candidate.load.blocks_used + candidate.load.blocks_cached)
