"""Chooses nodes by predicted time: where would this request's first token come soonest, all that it delays counted?

For each node that generates, two ways are compared:

    here       wait for its queue, load the longer prefix of a peer or recompute it (whichever is sooner), compute the rest
    apart      the same on the best prefill node, then hand over what the generating node lacks

Decoding is charged for a guessed number of steps: the request's own, and what it adds to those of all that decode beside it.
Computing is charged beyond its own duration: it keeps the node from other work, and it delays the sequences that decode beside
it. That is why long prompts go to the prefill pool and short uncached tails do not, without any threshold. Filling blocks is
charged where it pushes out others' prefixes.

A node with far more work than its pool's mean is passed over, unless its longer prefix saves more time than its excess costs: so
a hot prefix gathers its requests until waiting for it costs more than another copy.

See also `baselines.py` for other policies of the same interface.
"""

from collections.abc import Sequence
from itertools import islice
from math import inf

from orchestrator.core.blocks import blocks_for
from orchestrator.core.cluster.baselines import make_baseline
from orchestrator.core.cluster.candidates import STEPS_GUESSED, Candidate, Options, Placement, Router, computes_in_no_time
from orchestrator.core.cluster.kvindex import columns_in
from orchestrator.core.commands import Scores
from orchestrator.core.config import RouterConfig, RouterPolicy
from orchestrator.core.cost.costs import fetch_seconds, prompt_seconds
from orchestrator.core.types import NodeId, Request, ServiceClass

#: How much a second of decoding counts beside one of waiting for the first token.
DECODE_WEIGHT = {
    ServiceClass.BATCH: 0.25,
    ServiceClass.STANDARD: 1.0,
    ServiceClass.INTERACTIVE: 2.0,
    ServiceClass.CADENCE: 4.0,
}
#: Added to the score of an overloaded node: it is chosen only among others of its kind.
PASSED_OVER_S = 1e9
#: Peers with the longest prefix that are compared before one of them is fetched from.
PEERS_COMPARED_MAX = 8


def make_router(config: RouterConfig) -> Router:
    """Return the policy that the cluster file names."""
    if config.policy is RouterPolicy.PREDICTED_TIME:
        return PredictedTimeRouter(config)
    return make_baseline(config)


class _Way:
    """What serving one prompt costs on any node of a cost group that holds a given part of it, by the profile."""

    __slots__ = ("compute_s", "fetch_s", "handoff_s", "hit_tokens", "rest_s", "seconds")

    def __init__(self, hit_tokens: int, compute_s: float, fetch_s: float, rest_s: float, handoff_s: float) -> None:
        self.hit_tokens = hit_tokens
        #: Computing all that is not held.
        self.compute_s = compute_s
        #: Fetching what the best peer has beyond that, and computing what then remains. Infinite if no peer has more.
        self.fetch_s = fetch_s
        self.rest_s = rest_s
        #: The sooner of the two, other work not counted.
        self.seconds = min(compute_s, fetch_s + rest_s)
        #: Handing over what is not held from a prefill node that computes it meanwhile.
        self.handoff_s = handoff_s


class _Choice:
    """A node and what it would cost there."""

    __slots__ = ("apart", "candidate", "compute_s", "fetch_s", "fetches", "here_s", "score", "way")

    def __init__(self, candidate: Candidate, way: _Way, score: float) -> None:
        self.candidate = candidate
        self.way = way
        self.score = score
        #: Whether the prompt is left to a prefill node.
        self.apart = False
        factor = candidate.compute_factor
        #: Whether fetching from a peer beats recomputing on this node.
        self.fetches = way.fetch_s + way.rest_s * factor < way.compute_s * factor
        #: Seconds of computing, without what it costs others, and of fetching before that.
        self.compute_s = (way.rest_s if self.fetches else way.compute_s) * candidate.load.cost_scale
        self.fetch_s = way.fetch_s if self.fetches else 0.0
        #: The score, without the step's, of computing on this node.
        self.here_s = candidate.ready_s + min(way.compute_s * factor, way.fetch_s + way.rest_s * factor)


class _Prompt:
    """One request's prompt and the ways to serve it, worked out once for all nodes that hold equally much of it."""

    __slots__ = ("_ways", "hashes", "prefill", "reach_blocks", "tokens")

    def __init__(self, request: Request, options: Options) -> None:
        self.tokens = request.prompt_tokens
        self.hashes = len(request.hashes)
        #: The longest prefix that any node can be asked for, blocks.
        self.reach_blocks = options.matches.blocks_max
        #: The prefill node that the prompt may be left to.
        self.prefill: _Choice | None = None
        self._ways: dict[tuple[int, int], _Way] = {}

    def way(self, candidate: Candidate, blocks: int) -> _Way:
        """Return the way to serve the prompt on nodes like `candidate` that hold its first `blocks` blocks."""
        key = candidate.cost_group, blocks
        return self._ways.get(key) or self._ways.setdefault(key, self._work_out(candidate, blocks))

    def _work_out(self, candidate: Candidate, blocks: int) -> _Way:
        spec, profile = candidate.spec, candidate.profile
        hit = min(blocks * spec.block_tokens, self.tokens - 1)
        compute_s = prompt_seconds(profile, self.tokens - hit, hit, spec.step_tokens_max)
        fetch_s = rest_s = inf
        # The nominal profile of nodes that compute in no time is for ranking alone: they have nothing to gain from a peer.
        if self.reach_blocks > blocks and not computes_in_no_time(spec.profile):
            reach = min(self.reach_blocks * spec.block_tokens, self.tokens - 1)
            fetch_s = fetch_seconds(profile, (self.reach_blocks - blocks) * spec.block_bytes)
            rest_s = prompt_seconds(profile, self.tokens - reach, reach, spec.step_tokens_max)
        handoff_s = 0.0
        if self.prefill is not None:
            handoff_s = self._handoff_s(candidate, blocks, self.prefill.compute_s)
        return _Way(hit, compute_s, fetch_s, rest_s, handoff_s)

    def _handoff_s(self, candidate: Candidate, blocks: int, while_computing_s: float) -> float:
        """Return the seconds that handing over takes beyond the computing: the last step's blocks at least."""
        spec, profile = candidate.spec, candidate.profile
        lacking = blocks_for(self.tokens, spec.block_tokens) - blocks
        last = min(lacking, blocks_for(spec.step_tokens_max, spec.block_tokens))
        transfer_s = fetch_seconds(profile, lacking * spec.block_bytes)
        return max(transfer_s - while_computing_s, fetch_seconds(profile, last * spec.block_bytes))


class PredictedTimeRouter:
    """The node, or the pair of nodes, with the lowest predicted time; ties go to the session's nodes, then to the idlest."""

    __slots__ = ("_config", "_turn")

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        #: Decisions so far: the last tie-break rotates with it, so that equal nodes take turns.
        self._turn = 0

    def place(self, request: Request, options: Options) -> Placement | None:
        """Return where a request goes; None without candidates, or while those that must compute its prompt are full."""
        if not options.generators:
            return None
        self._turn += 1
        prompt = _Prompt(request, options)
        if options.prefillers:
            prompt.prefill = self._best(prompt, options, options.prefillers, 0.0)
        steps = STEPS_GUESSED * DECODE_WEIGHT[request.service_class]
        choice = self._best(prompt, options, options.generators, steps)
        if choice.apart and prompt.prefill is not None:
            return self._apart(prompt, options, choice, prompt.prefill)
        least = self._config.disaggregation_tokens_min
        if least is not None and options.prefillers_full and prompt.tokens - choice.way.hit_tokens >= least:
            return None
        return self._here(prompt, options, choice)

    def _best(self, prompt: _Prompt, options: Options, candidates: Sequence[Candidate], steps: float) -> _Choice:
        """Return the best of the candidates that are not overloaded, or of all if all are; they decode for so many steps.

        This loop is what a decision costs: it touches every node, so it holds nothing that could be done before or after.
        """
        present, way_of = options.present, prompt.way
        limit_s = self._limit_s(prompt, present, candidates)
        tied: list[Candidate] = []
        lowest = inf
        for candidate in candidates:
            blocks = present[candidate.column]
            way = way_of(candidate, blocks)
            factor = candidate.compute_factor
            score = candidate.ready_s + min(way.compute_s * factor, way.fetch_s + way.rest_s * factor)
            if prompt.prefill is not None:
                score = self._apart_s(prompt, prompt.prefill, candidate, way, score) or score
            if steps:
                step_s = candidate.step_s + candidate.joining_s + prompt.tokens * candidate.joining_token_s
                score += step_s * steps
            new_blocks = prompt.hashes - blocks
            if new_blocks > candidate.free_blocks:
                score += (new_blocks - candidate.free_blocks) * candidate.evicted_block_s
            if candidate.work_s + way.seconds > limit_s or new_blocks > candidate.room_blocks:
                score += PASSED_OVER_S
            if score < lowest:
                lowest, tied = score, [candidate]
            elif score == lowest:
                tied.append(candidate)
        best = tied[0] if len(tied) == 1 else self._first_of(tied, options)
        way = way_of(best, present[best.column])
        choice = _Choice(best, way, lowest)
        if prompt.prefill is not None:
            choice.apart = self._apart_s(prompt, prompt.prefill, best, way, choice.here_s) is not None
        return choice

    def _limit_s(self, prompt: _Prompt, present: Sequence[int], candidates: Sequence[Candidate]) -> float:
        """Return the work, with the prompt's own, from which on a node is passed over.

        The prompt is counted with the seconds it takes where least of it is held: a longer prefix earns its node patience.
        """
        mean_s = sum([candidate.work_s for candidate in candidates]) / len(candidates)
        least = min([present[candidate.column] for candidate in candidates])
        plain_s = prompt.way(candidates[0], least).seconds
        return self._config.load_factor_max * mean_s + self._config.load_floor_s + plain_s

    def _apart_s(self, prompt: _Prompt, prefill: _Choice, candidate: Candidate, way: _Way, here_s: float) -> float | None:
        """Return the score of leaving the prompt to the prefill node if that is to be done, None if not."""
        apart_s = prefill.score + way.handoff_s + candidate.slot_wait_s + candidate.step_s / 2
        least = self._config.disaggregation_tokens_min
        leaves = apart_s < here_s if least is None else prompt.tokens - way.hit_tokens >= least
        return apart_s if leaves else None

    def _first_of(self, tied: list[Candidate], options: Options) -> Candidate:
        """Return the first of nodes with equal scores: the session's, then the one with fewest requests, then by turns."""
        if options.sticky:
            tied = [candidate for candidate in tied if candidate.spec.id in options.sticky] or tied
        fewest = min([candidate.requests for candidate in tied])
        tied = [candidate for candidate in tied if candidate.requests == fewest]
        return tied[self._turn % len(tied)]

    def _here(self, prompt: _Prompt, options: Options, choice: _Choice) -> Placement:
        candidate = choice.candidate
        source, source_tokens = self._source(prompt, options, choice)
        hit_tokens = max(choice.way.hit_tokens, min(source_tokens, prompt.tokens - 1))
        scores = self._scores(options, choice, hit_tokens, candidate.step_s)
        return Placement(candidate, None, source, source_tokens, hit_tokens, scores)

    def _apart(self, prompt: _Prompt, options: Options, generate: _Choice, prefill: _Choice) -> Placement:
        source, source_tokens = self._source(prompt, options, prefill)
        hit_tokens = max(prefill.way.hit_tokens, min(source_tokens, prompt.tokens - 1))
        after_s = generate.way.handoff_s + generate.candidate.slot_wait_s + generate.candidate.step_s
        scores = self._scores(options, prefill, hit_tokens, after_s)
        return Placement(generate.candidate, prefill.candidate, source, source_tokens, hit_tokens, scores)

    def _scores(self, options: Options, choice: _Choice, hit_tokens: int, after_s: float) -> Scores:
        """Explain a choice; `after_s` is what comes after computing: the hand-over and the first step."""
        queue_s = choice.candidate.ready_s
        return Scores(
            policy=RouterPolicy.PREDICTED_TIME.value,
            hit_tokens=hit_tokens,
            predicted_ttft_s=queue_s + choice.fetch_s + choice.compute_s + after_s,
            queue_s=queue_s,
            compute_s=choice.compute_s,
            fetch_s=choice.fetch_s,
            candidates=len(options.generators) + len(options.prefillers),
        )

    def _source(self, prompt: _Prompt, options: Options, choice: _Choice) -> tuple[NodeId | None, int]:
        """Return the peer to fetch from and the prompt tokens it has; (None, 0) if recomputing is as good."""
        if not choice.fetches:
            return None, 0
        blocks, mask = options.matches.levels[-1]
        # Half of the time the search starts in the middle, and so on: nobody is asked always.
        upper = mask >> (start := self._turn % len(options.present)) << start
        columns = (column for part in (upper, mask & ~upper) for column in columns_in(part) if column != choice.candidate.column)
        peers = [options.peers[column] for column in islice(columns, PEERS_COMPARED_MAX)]
        if not peers:
            return None, 0
        host = choice.candidate.spec.host
        peer = min(peers, key=lambda peer: (peer.spec.id not in options.sticky, peer.spec.host != host, peer.work_s))
        return peer.spec.id, min(blocks * peer.spec.block_tokens, prompt.tokens)
