"""Chooses nodes by predicted time: where would this request's first token come soonest, all that it delays counted?

For each node that generates, two ways are compared:

    here       wait for its queue; load what its host's store has, fetch the longer prefix of a peer, one after the other, or
               recompute it (whichever is soonest); compute the rest
    apart      the same on the best prefill node, then hand over what the generating node lacks

Decoding is charged for a guessed number of steps: the request's own, and what it adds to those of all that decode beside it.
Computing is charged beyond its own duration: it keeps the node from other work, and it delays the sequences that decode beside
it. That is why long prompts go to the prefill pool and short uncached tails do not, without any threshold. Filling blocks is
charged where it pushes out others' prefixes. A node that keeps a beat never computes a prompt: all of them are left to others.

A node with far more work than its pool's mean is passed over, unless its longer prefix saves more time than its excess costs: so
a hot prefix gathers its requests until waiting for it costs more than another copy.

See also `baselines.py` for other policies of the same interface.
"""

from collections.abc import Sequence
from math import inf

from orchestrator.core.blocks import blocks_for
from orchestrator.core.cluster.baselines import make_baseline
from orchestrator.core.cluster.candidates import (
    STEPS_GUESSED,
    Candidate,
    Options,
    Placement,
    Router,
    best_peer,
    computes_in_no_time,
)
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
_POLICY = RouterPolicy.PREDICTED_TIME.value
#: Added to the score of an overloaded node: it is chosen only among others of its kind.
PASSED_OVER_S = 1e9


def make_router(config: RouterConfig) -> Router:
    """Return the policy that the cluster file names."""
    if config.policy is RouterPolicy.PREDICTED_TIME:
        return PredictedTimeRouter(config)
    return make_baseline(config)


class _Way:
    """What serving one prompt costs on any node of a cost group that holds a given part of it, by the profile."""

    __slots__ = (
        "brings",
        "compute_s",
        "fetch_s",
        "handoff_s",
        "hit_tokens",
        "load_rest_s",
        "load_s",
        "loaded_s",
        "rest_s",
        "seconds",
        "stored_tokens",
    )

    def __init__(self, hit_tokens: int, compute_s: float) -> None:
        self.hit_tokens = hit_tokens
        #: Computing all that is not held.
        self.compute_s = compute_s
        #: Loading the prompt's first `stored_tokens` from the host's store as far as they are not held, and computing what then
        #: remains. Infinite if the store has no more.
        self.load_s = self.load_rest_s = inf
        self.stored_tokens = 0
        #: Fetching what the best peer has beyond that, after loading for `loaded_s` what the store has if that is sooner than
        #: fetching all, and computing what then remains. Infinite if no peer has more.
        self.fetch_s = self.rest_s = inf
        self.loaded_s = 0.0
        #: Whether there is anything to load or to fetch.
        self.brings = False
        #: The soonest of the three, other work not counted.
        self.seconds = compute_s
        #: Handing over what is not held from a prefill node that computes it meanwhile.
        self.handoff_s = 0.0


class _Choice:
    """A node and what it would cost there."""

    __slots__ = ("apart", "candidate", "compute_s", "fetch_s", "fetches", "here_s", "load_s", "score", "stored_tokens", "way")

    def __init__(self, candidate: Candidate, way: _Way, score: float) -> None:
        self.candidate = candidate
        self.way = way
        self.score = score
        #: Whether the prompt is left to a prefill node.
        self.apart = False
        factor = candidate.compute_factor
        compute_s, load_s = way.compute_s * factor, way.load_s + way.load_rest_s * factor
        fetch_s = way.fetch_s + way.rest_s * factor
        #: Whether fetching from a peer beats recomputing on this node, and loading alone.
        self.fetches = fetch_s < min(compute_s, load_s)
        loads = way.loaded_s > 0.0 if self.fetches else load_s < compute_s
        #: Prompt tokens that the host's store is to bring; 0: none.
        self.stored_tokens = way.stored_tokens if loads else 0
        #: Seconds of computing, without what it costs others, of fetching before that, and of loading before that.
        uncached_s = way.rest_s if self.fetches else way.load_rest_s if loads else way.compute_s
        self.compute_s = uncached_s * candidate.load.cost_scale
        self.fetch_s = way.fetch_s - way.loaded_s if self.fetches else 0.0
        self.load_s = way.load_s if loads else 0.0
        #: The score, without the step's, of computing on this node.
        self.here_s = candidate.ready_s + min(compute_s, load_s, fetch_s)


class _Prompt:
    """One request's prompt and the ways to serve it, worked out once for all nodes that hold equally much of it."""

    __slots__ = ("_beside_store", "_cmx_blocks", "_present", "_ways", "hashes", "prefill", "reach_blocks", "tokens", "way_on")

    def __init__(self, request: Request, options: Options) -> None:
        self.tokens = request.prompt_tokens
        self.hashes = len(request.hashes)
        #: The longest prefix that any node can be asked for, blocks.
        self.reach_blocks = options.matches.blocks_max
        #: The prefill node that the prompt may be left to.
        self.prefill: _Choice | None = None
        self._ways: dict[tuple[int, int], _Way] = {}
        #: Blocks that stores have of it: in `cpu` by column, beside what nodes hold, and in `cmx`.
        self._present = options.present
        self._cmx_blocks = options.cmx_blocks
        self._beside_store: dict[tuple[int, int, int, int], _Way] = {}
        #: Returns the way to serve the prompt on a node that holds so many of its first blocks, its host's store counted.
        self.way_on = self._way_beside_store if options.stores else self.way

    def way(self, candidate: Candidate, blocks: int) -> _Way:
        """Return the way to serve the prompt on nodes like `candidate` that hold its first `blocks` blocks, and have no store."""
        key = candidate.cost_group, blocks
        return self._ways.get(key) or self._ways.setdefault(key, self._work_out(candidate, blocks, 0))

    def _way_beside_store(self, candidate: Candidate, blocks: int) -> _Way:
        column = candidate.store_column
        if column is None:
            return self.way(candidate, blocks)
        stored = self._present[column]
        key = candidate.cost_group, blocks, candidate.load_group, stored
        return self._beside_store.get(key) or self._beside_store.setdefault(key, self._work_out(candidate, blocks, stored))

    def _work_out(self, candidate: Candidate, blocks: int, stored: int) -> _Way:
        """Work out a way; the host's store has the first `stored` blocks in `cpu`."""
        spec, profile = candidate.spec, candidate.profile
        hit = min(blocks * spec.block_tokens, self.tokens - 1)
        way = _Way(hit, prompt_seconds(profile, self.tokens - hit, hit, spec.step_tokens_max))
        # The nominal profile of nodes that compute in no time is for ranking alone: they have nothing to gain from a peer.
        if not computes_in_no_time(spec.profile):
            if candidate.store is not None:
                self._add_load(way, candidate, blocks, stored)
            if self.reach_blocks > blocks:
                self._add_fetch(way, candidate, blocks)
        if self.prefill is not None:
            way.handoff_s = self._handoff_s(candidate, blocks, self.prefill.compute_s)
        return way

    def _add_load(self, way: _Way, candidate: Candidate, blocks: int, stored: int) -> None:
        """Work out how long loading takes: of what is in `cpu` alone, or of what is in `cmx` behind that too."""
        spec, store = candidate.spec, candidate.store
        assert store is not None, f"{spec.id} has no store to load from"
        cpu_bytes_per_s, cmx_bytes_per_s, cmx_latency_s = store.rates
        cpu_end = max(blocks, stored)
        block_bytes = store.model.block_bytes  # which may be fewer than in a node's memory
        cpu_s = candidate.profile.fetch_latency_s + (cpu_end - blocks) * block_bytes / cpu_bytes_per_s
        ways = [(cpu_s, cpu_end)]
        if store.model.cmx and self._cmx_blocks > cpu_end:
            cmx_s = cmx_latency_s + (self._cmx_blocks - cpu_end) * block_bytes / cmx_bytes_per_s
            ways.append((cpu_s + cmx_s, self._cmx_blocks))
        for load_s, end in ways:
            reach = min(end * spec.block_tokens, self.tokens - 1)
            if reach <= way.hit_tokens:
                continue
            rest_s = prompt_seconds(candidate.profile, self.tokens - reach, reach, spec.step_tokens_max)
            if load_s + rest_s < way.load_s + way.load_rest_s:
                way.brings = True
                way.load_s, way.load_rest_s, way.stored_tokens = load_s, rest_s, end * spec.block_tokens
        way.seconds = min(way.seconds, way.load_s + way.load_rest_s)

    def _add_fetch(self, way: _Way, candidate: Candidate, blocks: int) -> None:
        """Work out how long fetching takes, of all that is not held or of what the store does not bring."""
        spec, profile = candidate.spec, candidate.profile
        reach = min(self.reach_blocks * spec.block_tokens, self.tokens - 1)
        way.brings = True
        way.fetch_s = fetch_seconds(profile, (self.reach_blocks - blocks) * spec.block_bytes)
        way.rest_s = prompt_seconds(profile, self.tokens - reach, reach, spec.step_tokens_max)
        behind = self.reach_blocks - way.stored_tokens // spec.block_tokens
        if behind > 0 and way.load_s + fetch_seconds(profile, behind * spec.block_bytes) < way.fetch_s:
            way.loaded_s = way.load_s
            way.fetch_s = way.load_s + fetch_seconds(profile, behind * spec.block_bytes)
        way.seconds = min(way.seconds, way.fetch_s + way.rest_s)

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
        present, way_of, prefill = options.present, prompt.way_on, prompt.prefill
        limit_s = self._limit_s(prompt, present, candidates)
        tied: list[Candidate] = []
        lowest = inf
        for candidate in candidates:
            blocks = present[candidate.column]
            way = way_of(candidate, blocks)
            factor = candidate.compute_factor
            score = way.compute_s * factor
            if way.brings:
                score = min(score, way.load_s + way.load_rest_s * factor, way.fetch_s + way.rest_s * factor)
            score += candidate.ready_s
            if prefill is not None:
                score = self._apart_s(prompt, prefill, candidate, way, score) or score
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
        if prefill is not None:
            choice.apart = self._apart_s(prompt, prefill, best, way, choice.here_s) is not None
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
        leaves = leaves or candidate.beats
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
        hit_tokens = self._hit_tokens(prompt, choice, source_tokens)
        scores = self._scores(options, choice, hit_tokens, candidate.step_s)
        stored_tokens = _stored_tokens(choice, options)
        return Placement(candidate, None, source, source_tokens, hit_tokens, scores, stored_tokens)

    def _apart(self, prompt: _Prompt, options: Options, generate: _Choice, prefill: _Choice) -> Placement:
        source, source_tokens = self._source(prompt, options, prefill)
        hit_tokens = self._hit_tokens(prompt, prefill, source_tokens)
        after_s = generate.way.handoff_s + generate.candidate.slot_wait_s + generate.candidate.step_s
        scores = self._scores(options, prefill, hit_tokens, after_s)
        stored_tokens = _stored_tokens(prefill, options)
        return Placement(generate.candidate, prefill.candidate, source, source_tokens, hit_tokens, scores, stored_tokens)

    @staticmethod
    def _hit_tokens(prompt: _Prompt, choice: _Choice, source_tokens: int) -> int:
        """Return the prompt tokens that will not be computed."""
        return max(choice.way.hit_tokens, min(max(source_tokens, choice.stored_tokens), prompt.tokens - 1))

    def _scores(self, options: Options, choice: _Choice, hit_tokens: int, after_s: float) -> Scores:
        """Explain a choice; `after_s` is what comes after computing: the hand-over and the first step."""
        queue_s = choice.candidate.ready_s
        return Scores(
            policy=_POLICY,
            hit_tokens=hit_tokens,
            predicted_ttft_s=queue_s + choice.load_s + choice.fetch_s + choice.compute_s + after_s,
            queue_s=queue_s,
            compute_s=choice.compute_s,
            fetch_s=choice.fetch_s,
            load_s=choice.load_s,
            candidates=len(options.generators) + len(options.prefillers),
        )

    def _source(self, prompt: _Prompt, options: Options, choice: _Choice) -> tuple[NodeId | None, int]:
        """Return the peer to fetch from and the prompt tokens it has; (None, 0) if recomputing is as good."""
        found = best_peer(options, choice.candidate, self._turn) if choice.fetches else None
        if found is None:
            return None, 0
        peer, blocks = found
        return peer.spec.id, min(blocks * peer.spec.block_tokens, prompt.tokens)


def _stored_tokens(choice: _Choice, options: Options) -> int:
    """Return the prompt tokens that the host's store is to bring as far as the node does not have them once their turn comes.

    What the node holds now counts among them: it may have forgotten that by then, and its store has what it held.
    """
    candidate = choice.candidate
    if candidate.store is None or computes_in_no_time(candidate.spec.profile):
        return choice.stored_tokens
    spec, profile, blocks = candidate.spec, candidate.profile, options.matches.blocks(candidate.column)
    held_tokens = blocks * spec.block_tokens
    load_s = profile.fetch_latency_s + blocks * candidate.store.model.block_bytes / candidate.store.rates[0]
    if held_tokens <= choice.stored_tokens or load_s >= prompt_seconds(profile, held_tokens, 0, spec.step_tokens_max):
        return choice.stored_tokens
    return held_tokens
