"""Forms a node's steps: who is admitted, who computes how much next, who gives way when blocks run out.

See also: `sequences.py`, the life of one assignment.

Rules for editors.

Rule 1: blocks for the whole target are taken at admission, so only decoding sequences ever need another block.
Rule 2: who ranks before whom is (priority, arrival); a sequence never takes a block from one that ranks before it. Whose prompt
        is admitted and computed next is between tenants a matter of shares (`core/fairness.py`), and of rank for each one's own.
Rule 3: while a step runs, every decoding sequence is in it; nothing that a step or a fetch may write to is released.
Rule 4: nothing here is proportional to the waiting queue, and nothing but the two loops over a step's slices to the batch.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.core.commands import Slice
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.cost.costs import decode_seconds, prompt_seconds, smoothed, smoothed_scale, step_seconds, token_seconds
from orchestrator.core.events import SliceResult
from orchestrator.core.fairness import Accounts, FairQueue, output_work
from orchestrator.core.kvpool import BlockPool
from orchestrator.core.node.drafting import SequenceDrafts
from orchestrator.core.node.sequences import Phase, Sequence
from orchestrator.core.node.speculation import Speculation
from orchestrator.core.types import (
    DEFAULT_TENANT,
    Assignment,
    BlockHash,
    FinishReason,
    NodeSpec,
    RequestId,
    Role,
    StepId,
    TenantId,
    TenantLoad,
)

#: Blocks that an admission leaves available, as a share of the pool: vLLM's block manager uses the same.
WATERMARK = 0.01
_UNNAMED = frozenset({DEFAULT_TENANT})


@dataclass(slots=True)
class DecodePlan:
    """The decoding sequences of a step; made once a step, like `StepPlan`."""

    sequences: list[Sequence]
    slices: list[Slice]
    #: Tokens that may be drafted, wherever they come from, all sequences together.
    draft_tokens: int = 0
    #: Steps like this one after which another may be drafted in; None: there is no end to them.
    steps_max: int | None = None


@dataclass(slots=True)
class StepPlan:
    """A step that runs: its decoding sequences, then its prompt chunks, in the order of its slices.

    Like `StepOutcome` made once a step, and for that reason not frozen.
    """

    step: StepId
    decoding: list[Sequence]
    prefilling: list[Sequence]
    slices: tuple[Slice, ...]
    predicted_s: float
    #: Context of the decoding sequences before the step.
    context_tokens: int
    #: As in `RunStep`.
    steps_max: int


class StepOutcome:
    """What a finished step means, for the node to act on and to report."""

    __slots__ = ("advanced", "ended", "started")

    def __init__(self) -> None:
        #: Sequences to end, with reason and message.
        self.ended: list[tuple[Sequence, FinishReason, str]] = []
        #: Sequences that sampled their first token here.
        self.started: list[Sequence] = []
        #: Sequences whose prompt got further; some of them may be complete.
        self.advanced: list[Sequence] = []

    @property
    def quiet(self) -> bool:
        """True if the step brought tokens and nothing else."""
        return not (self.ended or self.advanced)


class Scheduler:
    """The sequences of one node, by phase, and the step that runs."""

    def __init__(self, spec: NodeSpec, config: SchedulerConfig, pool: BlockPool) -> None:
        self._profile = spec.profile
        self._stores = spec.stores
        self._pool = pool
        self._caching = config.prefix_caching
        self._block_tokens = spec.block_tokens
        self._context_tokens_max = spec.context_tokens_max
        self._step_tokens_max = min(spec.step_tokens_max, config.step_tokens_max)
        self._running_max = min(spec.sequences_max, config.sequences_max, self._step_tokens_max)
        self._watermark = int(spec.blocks * WATERMARK) + 1
        self._arrivals = 0
        self._steps = 0
        #: A tenant competes with every sequence that waits or whose prompt is being fetched or computed.
        self._accounts = Accounts()
        #: Waiting sequences that nobody computes for.
        self._queue: FairQueue[Sequence] = FairQueue(self._accounts)
        #: Those that came since somebody was last to be admitted: most of them wait no longer than that.
        self._came: dict[RequestId, Sequence] = {}
        #: Sequences by phase, in order of their coming into it.
        self._fetching: dict[RequestId, Sequence] = {}
        self._prefilling: dict[RequestId, Sequence] = {}
        self._decoding: dict[RequestId, Sequence] = {}
        #: Who registers a block next. A block that two compute at once is the first one's.
        self._leaders: dict[BlockHash, Sequence] = {}
        #: The step that runs.
        self.plan: StepPlan | None = None
        #: Sums over sequences: waiting ones (queue and followers); `queued` of all, of the prefilling; context of the decoding.
        self.waiting = 0
        self.queued_tokens = 0
        self._queued_by: dict[TenantId, int] = {}
        self._backlog_tokens = 0
        self.context_tokens = 0
        self.preemptions = 0
        #: Blocks that the sequence to be admitted next lacks; 0 if it waits for something else, or nobody waits.
        self.short_blocks = 0
        self.cost_scale = 1.0
        self.step_s = 0.0
        #: None if the engine drafts nothing.
        self._speculation = Speculation(spec) if spec.draft_tokens_max else None

    @property
    def running(self) -> int:
        """Sequences that are admitted and not yet complete."""
        return len(self._decoding) + len(self._prefilling) + len(self._fetching)

    @property
    def fetching(self) -> int:
        """Sequences that load or fetch."""
        return len(self._fetching)

    @property
    def decoding(self) -> int:
        """Sequences that decode."""
        return len(self._decoding)

    @property
    def reserve_blocks(self) -> int:
        """Blocks that who comes beside others leaves available: one more for each that decodes, and some for more of those."""
        return max(self._watermark, len(self._decoding))

    @property
    def drafted_tokens(self) -> int:
        """Tokens drafted since the start."""
        return self._speculation.drafted_tokens if self._speculation is not None else 0

    @property
    def accepted_tokens(self) -> int:
        """Those of the drafted tokens that were accepted."""
        return self._speculation.accepted_tokens if self._speculation is not None else 0

    @property
    def told_context_tokens(self) -> int:
        """What gateways are told of its contexts: those of the sequences that decode."""
        return self.context_tokens

    @property
    def tenants(self) -> tuple[TenantLoad, ...]:
        """What waits by tenant, as in `Load`."""
        if not self._queued_by or self._queued_by.keys() <= _UNNAMED:
            return ()
        return tuple([TenantLoad(tenant, self._queue.waiting(tenant), tokens) for tenant, tokens in self._queued_by.items()])

    def in_step(self, sequence: Sequence) -> bool:
        """Return whether the running step may write to a sequence's blocks (rule 3)."""
        return self.plan is not None and (sequence.phase is Phase.DECODING or sequence.chunk > 0)

    # --- coming and going -------------------------------------------------------------------------------------------------

    def refusal(self, assignment: Assignment) -> str | None:
        """Return why this node can never serve an assignment, or None if it can."""
        prompt, output, given = assignment.prompt_tokens, assignment.output_tokens_max, assignment.given_tokens
        generates = assignment.role is Role.GENERATE
        if prompt < 1 or (generates and output < 1):
            return f"a prompt of {prompt} tokens with at most {output} tokens of output: both must be 1 or more"
        if generates and assignment.generated_tokens >= output:
            return f"{assignment.generated_tokens} tokens of output were generated already, of {output} at most"
        if len(assignment.hashes) != given // self._block_tokens:
            return f"{len(assignment.hashes)} block hashes for {given} tokens in blocks of {self._block_tokens}"
        if prompt + output * generates > self._context_tokens_max:
            return f"{prompt} prompt tokens and {output} of output are over the context limit of {self._context_tokens_max}"
        needed = self._blocks_for(given + 1 if generates else given - 1)
        if needed > self._pool.blocks:
            return f"a prompt of {given} tokens needs {needed} blocks, the pool has {self._pool.blocks}"
        return None

    def enqueue(self, assignment: Assignment) -> Sequence:
        """Let an assignment that is not refused wait for its admission."""
        sequence = Sequence(assignment, self._arrivals, self._block_tokens, self._pool.blocks, self._stores)
        self._arrivals += 1
        self._wait(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence in any phase and give its blocks back. No step and no fetch may be writing to them."""
        assert not self.in_step(sequence), f"request {sequence.request} is in running step {self._steps}"
        self._leave(sequence)
        if sequence.competes:
            self._compete_no_more(sequence)
        if sequence.claim is not None and sequence.assignment.outlook is not None:
            self._pool.leave(sequence.claim, sequence.assignment.outlook)
        self._free(sequence)
        if sequence.queued:
            self._set_queued(sequence, 0)
        sequence.phase = Phase.GONE

    def abandon(self, sequence: Sequence) -> None:
        """Let nobody wait any longer for blocks of a sequence that is about to end."""
        if sequence.frontier is not None:  # else nobody does
            self._stop_leading(sequence)
            self._release_followers(sequence, everyone=True)

    def hold(self, sequence: Sequence) -> None:
        """Take a completely prefilled sequence out of the batch; its blocks stay until it is removed."""
        self._leave(sequence)
        self._compete_no_more(sequence)
        sequence.phase = Phase.HELD

    def advance_fetch(self, sequence: Sequence, tokens: int, direct: bool) -> None:
        """Note that a load or a fetch has brought the first `tokens` of a prompt; a load past the store's memory if `direct`."""
        sequence.computed = max(sequence.computed, min(tokens, sequence.wanted_tokens))
        sequence.count_present(sequence.computed, loaded=not sequence.loaded)
        registered = sequence.registered
        self._register(sequence)
        if not sequence.loaded and not direct and sequence.registered > registered and self._caching:
            self._pool.mark_offered(sequence.hashes, sequence.registered)

    def end_load(self, sequence: Sequence, cmx_tokens: int) -> bool:
        """Note that a load is over, of which `cmx_tokens` came from there; return whether the source has still more."""
        sequence.loaded = True
        sequence.loaded_cmx_tokens = min(sequence.loaded_cmx_tokens + cmx_tokens, sequence.loaded_tokens)
        self._set_queued(sequence, self._tokens_to_compute(sequence, sequence.registered))
        return sequence.fetch_tokens(sequence.registered) > 0

    def recompute_seconds(self, sequence: Sequence) -> float:
        """Return the seconds after which what a sequence still loads would have been computed here; 0.0 if nobody knows."""
        profile, tokens = self._profile, sequence.wanted_tokens - sequence.computed
        seconds = prompt_seconds(profile, tokens, sequence.computed, self._step_tokens_max)
        before_s = self._backlog_tokens * token_seconds(profile, self._step_tokens_max)
        return (seconds + before_s) * self.cost_scale if seconds > 0.0 else 0.0

    def end_fetch(self, sequence: Sequence, computed_tokens: int) -> None:
        """Let a sequence whose fetch is over compute what is missing; its source computed some tokens for it."""
        sequence.billed_tokens += computed_tokens
        sequence.fetched = True
        self._leave(sequence)
        self._set_queued(sequence, sequence.remaining_tokens)
        self._prefill(sequence)

    def forgo_fetch(self, sequence: Sequence) -> None:
        """Let a sequence that waits or loads compute what it was to fetch."""
        loads = sequence.phase is Phase.FETCHING and not sequence.loaded
        assert loads or sequence.phase is Phase.WAITING, f"request {sequence.request} is {sequence.phase.value}, not waiting"
        sequence.fetched = True
        hit = sequence.registered if loads else self._pool.match(sequence.hashes, sequence.hit_blocks_max)
        self._set_queued(sequence, self._tokens_to_compute(sequence, hit))

    # --- admission --------------------------------------------------------------------------------------------------------

    def stranded(self) -> list[Sequence]:
        """Return the admitted prompts that somebody else was to compute and did not: here there are none, this node does it."""
        return []

    def admit(self) -> list[Sequence]:
        """Admit waiting sequences in order as long as there is room, and return them: prefilling, or to be fetched for.

        One whose next block is being computed by another steps aside until that block is there. The first that finds too
        few blocks, or a step's worth of prompts before it, holds up those behind it.
        """
        admitted: list[Sequence] = []
        queue = self._queue
        self.short_blocks = 0
        if not self.waiting:
            return admitted
        while queue.count and self.running < self._running_max and (sequence := queue.first()) is not None:
            hit = self._pool.match(sequence.hashes, sequence.hit_blocks_max)
            brought = sequence.brought_tokens(hit)
            if not brought and self._step_aside(sequence, hit):
                continue
            full = not brought and self._tokens_before(sequence) + len(self._decoding) >= self._step_tokens_max
            if full:
                break
            self.short_blocks = max(0, self._blocks_short(sequence, hit))
            if self.short_blocks:
                break
            self._place(sequence, hit, brought)
            admitted.append(sequence)
        if self._came:
            self._await_chains()
        return admitted

    def _await_chains(self) -> None:
        """Let the pool keep what those find who came and were not admitted at once."""
        for sequence in self._came.values():
            self._pool.await_chain(sequence.request, sequence.hashes, self._pool.match(sequence.hashes, sequence.hit_blocks_max))
        self._came.clear()

    def _tokens_before(self, sequence: Sequence) -> int:
        """Return the prompt tokens that are computed before those of a sequence that comes to be admitted now."""
        if not self._accounts.contested:
            return self._backlog_tokens
        level = self._accounts.level(sequence.tenant)
        return sum(other.remaining_tokens for other in self._prefilling.values() if self._level_of(other) <= level)

    def _step_aside(self, sequence: Sequence, hit: int) -> bool:
        """Make a sequence follow the one that computes its next missing block, if there is one."""
        if not self._leaders or hit >= min(len(sequence.hashes), sequence.hit_blocks_max):
            return False
        leader = self._leaders.get(sequence.hashes[hit])
        if leader is None:
            return False
        self._leave(sequence)
        self.waiting += 1
        self._pool.await_chain(sequence.request, sequence.hashes, hit)
        leader.followers.append((leader.shared_blocks(sequence), sequence))
        sequence.leader = leader
        return True

    def _blocks_short(self, sequence: Sequence, hit: int) -> int:
        """Return how many blocks the pool lacks for a sequence and, beside others, one more for each that decodes."""
        needed = self._blocks_of(sequence) - hit
        if self.running:
            needed += self.reserve_blocks
        return self._blocks_lacking(sequence, hit, needed)

    def _blocks_lacking(self, sequence: Sequence, hit: int, needed: int) -> int:
        """Return how many blocks fewer than `needed` are left once a sequence holds those that it finds; 0 or less: enough."""
        short = needed - self._pool.available_blocks
        # Of what it finds, those that nobody holds are available now and will not be then: it takes a count only if it matters.
        return short if short > 0 or short + hit <= 0 else short + self._pool.idle_of(sequence.hashes, hit)

    def _place(self, sequence: Sequence, hit: int, brought: int) -> None:
        """Give a waiting sequence its blocks and let it begin: with a fetch up to token `brought`, if that is not 0."""
        self._leave(sequence)
        sequence.claim, sequence.table = self._pool.acquire(sequence.hashes, hit)
        sequence.table += self._pool.allocate(self._blocks_of(sequence) - hit)
        sequence.capacity = len(sequence.table) * self._block_tokens
        sequence.fresh = tuple(sequence.table)
        sequence.registered = hit
        sequence.present_before = sequence.computed = hit * self._block_tokens
        sequence.count_present(sequence.computed)
        self._set_queued(sequence, sequence.target - max(sequence.computed, brought))
        sequence.began_at = self._accounts.level(sequence.tenant)
        generated = sequence.assignment.generated_tokens
        output = output_work(sequence.output_tokens_max - generated) if sequence.assignment.role is Role.GENERATE else 0
        self._accounts.charge(sequence.tenant, sequence.queued + output, sequence.assignment.share)
        sequence.loaded = not sequence.load_tokens(hit)
        if brought:
            sequence.phase = Phase.FETCHING
            self._fetching[sequence.request] = sequence
            self._lead(sequence)
        else:
            sequence.fetched = True
            self._prefill(sequence)

    # --- steps ------------------------------------------------------------------------------------------------------------

    def plan_step(self) -> StepPlan | None:
        """Start the next step, and return it, or None if there is nothing to compute. No step may be running.

        A token for every decoding sequence, then as much of the prompts as fits, in the order of their admission and, between
        tenants, of the work done for them.
        """
        assert self.plan is None, f"step {self._steps} still runs"
        if not self._decoding and not self._prefilling:
            return None
        preemptions = self.preemptions
        decodes = self._plan_decoding() if self._decoding else DecodePlan([], [])
        decoding, slices = decodes.sequences, decodes.slices
        budget = self._step_tokens_max - len(slices) - decodes.draft_tokens
        chunks: list[Sequence] = []
        for sequence in self._prompts_in_order() if self._prefilling else ():
            if budget <= 0:
                break
            sequence.chunk = min(sequence.remaining_tokens, budget)
            budget -= sequence.chunk
            chunks.append(sequence)
            slices.append(self._chunk_slice(sequence))
        if not slices:
            return None
        self._steps += 1
        prefills = [(sequence.chunk, sequence.computed) for sequence in chunks]
        context, count = self.context_tokens, len(decoding)
        predicted_s = step_seconds(self._profile, prefills, count, context)
        # Every block that becomes full in so many steps can be followed by another one. Who gave way may be back after one.
        alone = bool(chunks) or self.preemptions > preemptions
        steps_max = 1 if alone else max(1, self._pool.available_blocks // count * self._block_tokens)
        if decodes.steps_max is not None:
            steps_max = min(steps_max, decodes.steps_max)
        self.plan = StepPlan(StepId(self._steps), decoding, chunks, tuple(slices), predicted_s, context, steps_max)
        return self.plan

    def _prompts_in_order(self) -> Collection[Sequence]:
        prompts: Collection[Sequence] = self._prefilling.values()
        if self._accounts.contested:
            prompts = sorted(prompts, key=self._level_of)
        self._accounts.reach(next(iter(prompts)).began_at)
        return prompts

    def _level_of(self, sequence: Sequence) -> float:
        """Return where a prompt stands among other tenants': it keeps its place for a step's worth, then it gives way."""
        done = sequence.computed - sequence.present_before - self._step_tokens_max
        return sequence.began_at + max(0, done) / sequence.assignment.share

    def _plan_decoding(self) -> DecodePlan:
        """Return the decoding sequences and their slices, after those at the end of their blocks got another one."""
        for sequence in [sequence for sequence in self._decoding.values() if sequence.computed == sequence.capacity]:
            self._grow(sequence)
        decoding = list(self._decoding.values())
        if self._speculation is not None and decoding:  # the last one may have given way to itself
            return self._plan_drafts(self._speculation, decoding)
        return DecodePlan(decoding, self._decode_slices(decoding))

    def _plan_drafts(self, speculation: Speculation, decoding: list[Sequence]) -> DecodePlan:
        """Decide who may draft how much, and give them the blocks for it that nobody else will need."""
        count, budget = len(decoding), self._step_tokens_max - len(decoding)
        budget = budget // 2 if self._prefilling else budget
        drafts = speculation.begin_step(count, self.context_tokens, not self._prefilling)
        budget = min(budget, speculation.rows_max)
        wanted = self._wanted_drafts(speculation, decoding, budget) if drafts else [(0, 0)] * count
        tokens = 0
        for place, sequence in enumerate(decoding):
            room = self._room_for(sequence, min(max(wanted[place]), budget - tokens), count)
            wanted[place] = min(wanted[place][0], room), min(wanted[place][1], room)
            tokens += max(wanted[place])
        slices = self._decode_slices(decoding)
        for part, (looked_up, modelled) in zip(slices, wanted, strict=True):
            part.draft_max, part.model_draft_max = looked_up, modelled
        if not drafts or tokens:
            return DecodePlan(decoding, slices, tokens, 1)
        waits = [sequence.drafts.again_at - sequence.output_tokens for sequence in decoding if sequence.drafts is not None]
        return DecodePlan(decoding, slices, 0, max(1, min(waits, default=1)))

    def _room_for(self, sequence: Sequence, tokens: int, decoding: int) -> int:
        """Give a decoding sequence room for drafts, in blocks that nobody else will need; return how many there is room for."""
        short = self._blocks_for(max(0, sequence.computed + 1 + tokens - sequence.capacity))
        if short and self._pool.available_blocks >= decoding + short:
            self._extend(sequence, short)
        return min(tokens, sequence.capacity - sequence.computed - 1)

    def _wanted_drafts(self, speculation: Speculation, decoding: list[Sequence], budget: int) -> list[tuple[int, int]]:
        """Return how many tokens may be looked up, and drafted by a model, for each: none beyond the last one of its output."""
        looked_up: list[int] = []
        wishes: list[tuple[SequenceDrafts, int]] = []
        for sequence in decoding:
            if sequence.drafts is None:
                sequence.drafts = speculation.new_sequence()
            drafts, tokens, tokens_max = sequence.drafts, sequence.output_tokens, sequence.output_tokens_max
            most = tokens_max - tokens - 1 if sequence.ending is None else 0
            looked_up.append(min(speculation.looked_up_for(drafts, tokens), most))
            wishes.append((drafts, min(speculation.wish_for(drafts, tokens, tokens_max), most)))
        passes = speculation.passes_for(wishes, len(decoding), self.context_tokens)
        if passes:  # where there is not room for all that are wanted, each has some
            passes = min(passes, max(1, budget // sum([wish > 0 for _, wish in wishes])))
        modelled = [min(wish, max(passes, drafts.probing)) for drafts, wish in wishes]
        return list(zip(looked_up, modelled, strict=True))

    @staticmethod
    def _decode_slices(decoding: list[Sequence]) -> list[Slice]:
        """Return a slice for each sequence, which tells the blocks that it got since the last one."""
        slices = [Slice(sequence.request, sequence.computed, 1, sequence.told, sequence.fresh, True) for sequence in decoding]
        for sequence in decoding:
            if sequence.fresh:
                sequence.told += len(sequence.fresh)
                sequence.fresh = ()
        return slices

    def _chunk_slice(self, sequence: Sequence) -> Slice:
        """Return the slice of a sequence's chunk; the first one tells all blocks."""
        end = sequence.computed + sequence.chunk
        samples = end == sequence.target and sequence.assignment.role is Role.GENERATE
        part = Slice(sequence.request, sequence.computed, sequence.chunk, sequence.told, sequence.fresh, samples)
        sequence.told += len(sequence.fresh)
        sequence.fresh = ()
        return part

    def _grow(self, sequence: Sequence) -> None:
        """Give a decoding sequence one more block, preempting the last in rank, at worst itself, while there is none."""
        while sequence.phase is Phase.DECODING and self._pool.available_blocks == 0:
            running = (*self._decoding.values(), *self._prefilling.values())
            self._preempt(max(running, key=lambda other: other.rank))
        if sequence.phase is Phase.DECODING:
            self._extend(sequence, 1)

    def _extend(self, sequence: Sequence, count: int) -> None:
        """Give a sequence more blocks, of which there must be enough."""
        blocks = self._pool.allocate(count)
        sequence.table += blocks
        sequence.fresh = (*sequence.fresh, *blocks)
        sequence.capacity += count * self._block_tokens

    def _extend_all(self, decoding: Collection[Sequence], results: tuple[SliceResult, ...]) -> None:
        """Give sequences the blocks that several steps filled, before any is settled: that may claim available ones."""
        for sequence, result in zip(decoding, results, strict=False):
            beyond = sequence.computed + result.output_tokens - sequence.capacity
            if beyond > 0:
                self._extend(sequence, self._blocks_for(beyond))

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; what it computed stays reusable until its blocks are needed."""
        self._leave(sequence)
        self._free(sequence)
        sequence.loaded = not sequence.stored_tokens
        self.preemptions += 1
        self._wait(sequence)

    def finish_step(self, results: tuple[SliceResult, ...], seconds: float, steps: int = 1) -> StepOutcome:
        """Apply the results of the running step; those of sequences that are about to end are dropped.

        With `steps` over 1 it was repeated, and the results are those of all together.
        """
        plan = self._end_step()
        assert len(results) == len(plan.slices), f"{len(results)} results for {len(plan.slices)} slices of step {plan.step}"
        assert 1 <= steps <= plan.steps_max, f"step {plan.step} was run {steps} times, at most {plan.steps_max} were possible"
        drafts: Collection[tuple[int, int]] = ()
        drafting_s = 0.0
        if self._speculation is not None:
            drafting_s = sum([result.drafting_s or 0.0 for result in results])
            drafts = self._note_drafts(self._speculation, plan, results, (seconds - drafting_s) / steps)
        self._measure(plan, seconds, drafting_s, steps, drafts)
        outcome = StepOutcome()
        generated = 0
        if steps > 1:
            self._extend_all(plan.decoding, results)
        for sequence, result in zip(plan.decoding, results, strict=False):
            tokens = result.output_tokens
            generated += tokens
            sequence.computed += tokens
            sequence.output_tokens += tokens
            if (
                result.hashes
                or result.stopped
                or sequence.output_tokens >= sequence.output_tokens_max
                or sequence.ending is not None
                or result.failure is not None
                or tokens == 0
            ):
                self._settle(sequence, result, outcome)
        self.context_tokens += generated
        for sequence, result in zip(plan.prefilling, results[len(plan.decoding) :], strict=True):
            self._finish_chunk(sequence, result, outcome)
        return outcome

    def fail_step(self, reason: str) -> StepOutcome:
        """End every sequence of the running step, which computed nothing."""
        plan = self._end_step()
        outcome = StepOutcome()
        for sequence in (*plan.decoding, *plan.prefilling):
            sequence.chunk = 0
            outcome.ended.append((sequence, sequence.ending or FinishReason.FAILED, "" if sequence.ending else reason))
        return outcome

    @staticmethod
    def _note_drafts(
        speculation: Speculation, plan: StepPlan, results: tuple[SliceResult, ...], seconds: float
    ) -> list[tuple[int, int]]:
        """Note what became of a step's drafts, and return (tokens drafted, context before them) of each sequence that had any."""
        drafts: list[tuple[int, int]] = []
        for sequence, result in zip(plan.decoding, results, strict=False):
            tokens, noted = result.output_tokens, result.drafted_tokens or result.drafting_s is not None
            if noted and sequence.drafts is not None and tokens:
                speculation.note_drafts(sequence.drafts, sequence.output_tokens + tokens, result)
                if result.drafted_tokens:
                    drafts.append((result.drafted_tokens, sequence.computed + 1))
        if plan.decoding:
            speculation.note_step(len(plan.decoding), sum([drafted for drafted, _ in drafts]), seconds, not plan.prefilling)
        return drafts

    def _measure(
        self, plan: StepPlan, seconds: float, drafting_s: float, steps: int, drafts: Collection[tuple[int, int]]
    ) -> None:
        """Note how long a step took, beside what it was predicted to take: drafts are computed like parts of prompts.

        What a draft model took is left out of that: the prediction knows nothing of it.
        """
        predicted_s = plan.predicted_s
        if drafts:
            prefills = [(part.count, part.start) for part in plan.slices[len(plan.decoding) :]]
            predicted_s = step_seconds(self._profile, [*drafts, *prefills], len(plan.decoding), plan.context_tokens)
        if steps > 1:
            predicted_s = decode_seconds(self._profile, len(plan.decoding), plan.context_tokens, steps)
        self.cost_scale = smoothed_scale(self.cost_scale, predicted_s, seconds - drafting_s, steps)
        mean_s = seconds / steps
        self.step_s = mean_s if self.step_s == 0.0 else smoothed(self.step_s, mean_s, steps)

    def _end_step(self) -> StepPlan:
        plan = self.plan
        assert plan is not None, f"no step runs after step {self._steps}"
        self.plan = None
        return plan

    def _finish_chunk(self, sequence: Sequence, result: SliceResult, outcome: StepOutcome) -> None:
        """Apply what a step did for a prompt (or, after a preemption, for prompt and output so far)."""
        chunk, sequence.chunk = sequence.chunk, 0
        if sequence.ending is not None or result.failure is not None:
            self._settle(sequence, result, outcome)
            return
        sequence.computed += chunk
        sequence.count_present(sequence.computed, computed=True)
        self._backlog_tokens -= chunk
        self._set_queued(sequence, sequence.queued - chunk)
        sampled = sequence.remaining_tokens == 0 and sequence.assignment.role is Role.GENERATE
        assert (result.output_tokens > 0) == sampled, f"request {sequence.request}: {result.output_tokens} tokens, {sampled=}"
        if not sampled:
            self._register(sequence)
            outcome.advanced.append(sequence)
            return
        self._name_blocks(sequence, result)
        outcome.advanced.append(sequence)
        if sequence.output_tokens == sequence.assignment.generated_tokens:
            outcome.started.append(sequence)
        sequence.output_tokens += result.output_tokens
        self._decode(sequence)
        self._end_output(sequence, result, outcome)

    def _settle(self, sequence: Sequence, result: SliceResult, outcome: StepOutcome) -> None:
        """Register what a sequence completed, or end it, whichever its result says."""
        if sequence.ending is not None:
            outcome.ended.append((sequence, sequence.ending, ""))
            return
        if result.failure is not None:
            outcome.ended.append((sequence, FinishReason.FAILED, result.failure))
            return
        assert result.output_tokens > 0, f"request {sequence.request} sampled nothing in step {self._steps}"
        self._name_blocks(sequence, result)
        self._end_output(sequence, result, outcome)

    @staticmethod
    def _end_output(sequence: Sequence, result: SliceResult, outcome: StepOutcome) -> None:
        """End a sequence if its output is complete."""
        if result.stopped:
            outcome.ended.append((sequence, FinishReason.STOP, ""))
        elif sequence.output_tokens >= sequence.output_tokens_max:
            outcome.ended.append((sequence, FinishReason.LENGTH, ""))

    # --- blocks that become complete --------------------------------------------------------------------------------------

    def _name_blocks(self, sequence: Sequence, result: SliceResult) -> None:
        """Take the names of blocks that generated tokens completed, and register them."""
        if result.hashes:
            first = sequence.computed // self._block_tokens - len(result.hashes)
            known = len(sequence.hashes)
            assert 0 <= first <= known, f"request {sequence.request}: hashes from block {first} on, {known} are known"
            sequence.hashes[first:] = result.hashes
        self._register(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Offer a sequence's newly complete blocks for reuse and wake those who wait for them."""
        end = min(sequence.computed // self._block_tokens, len(sequence.hashes))
        if end <= sequence.registered:
            return
        start = sequence.registered
        assert sequence.claim is not None, f"request {sequence.request} has computed {end} blocks without any"
        copies = self._pool.register(sequence.claim, sequence.table[start:end], sequence.hashes[start:end])
        if copies:
            sequence.copies.append((start, start + copies))
        sequence.registered = end
        if sequence.phase is not Phase.DECODING:
            self._lead(sequence)

    def _lead(self, sequence: Sequence) -> None:
        """Announce the next block that a sequence will register, and release followers that have what they need."""
        if sequence.frontier is not None:
            self._stop_leading(sequence)
        index = sequence.registered
        if self._caching and sequence.ending is None and index < min(len(sequence.hashes), sequence.target // self._block_tokens):
            sequence.frontier = sequence.hashes[index]
            self._leaders.setdefault(sequence.frontier, sequence)
        if sequence.followers:
            self._release_followers(sequence, everyone=sequence.frontier is None)

    def _stop_leading(self, sequence: Sequence) -> None:
        assert sequence.frontier is not None, f"request {sequence.request} leads nobody"
        if self._leaders.get(sequence.frontier) is sequence:
            del self._leaders[sequence.frontier]
        sequence.frontier = None

    def _release_followers(self, leader: Sequence, everyone: bool) -> None:
        """Put followers back into the queue: those whose blocks are registered now, or all."""
        staying: list[tuple[int, Sequence]] = []
        for needed, follower in leader.followers:
            if everyone or needed <= leader.registered:
                follower.leader = None
                self._queue.push(follower.tenant, follower.rank, follower)
            else:
                staying.append((needed, follower))
        leader.followers = staying

    # --- phases and sums --------------------------------------------------------------------------------------------------

    def _wait(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        self.waiting += 1
        if not sequence.competes:
            self._accounts.enter(sequence.tenant)
            sequence.competes = True
        self._queue.push(sequence.tenant, sequence.rank, sequence)
        hit = self._pool.match(sequence.hashes, sequence.hit_blocks_max)
        self._set_queued(sequence, self._tokens_to_compute(sequence, hit))
        self._came[sequence.request] = sequence

    def _prefill(self, sequence: Sequence) -> None:
        sequence.phase = Phase.PREFILLING
        self._prefilling[sequence.request] = sequence
        self._backlog_tokens += sequence.queued
        self._lead(sequence)

    def _decode(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._compete_no_more(sequence)
        sequence.phase = Phase.DECODING
        self._decoding[sequence.request] = sequence
        self.context_tokens += sequence.computed

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of its phase's table and sums; the caller puts it into another."""
        match sequence.phase:
            case Phase.WAITING:
                self._leave_queue(sequence)
            case Phase.FETCHING:
                del self._fetching[sequence.request]
            case Phase.PREFILLING:
                del self._prefilling[sequence.request]
                self._backlog_tokens -= sequence.queued
            case Phase.DECODING:
                del self._decoding[sequence.request]
                self.context_tokens -= sequence.computed
            case Phase.HELD | Phase.GONE:
                pass
        if sequence.frontier is not None:
            self.abandon(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting -= 1
        if self._came.pop(sequence.request, None) is None:
            self._pool.stop_awaiting(sequence.request)
        leader = sequence.leader
        if leader is not None:
            leader.followers = [entry for entry in leader.followers if entry[1] is not sequence]
            sequence.leader = None
        else:
            self._queue.remove(sequence.tenant, sequence.rank)

    def _compete_no_more(self, sequence: Sequence) -> None:
        """Let a sequence that takes part in the turns of tenants do so no longer."""
        assert sequence.competes, f"request {sequence.request} is {sequence.phase.value} and competes for nothing"
        self._accounts.leave(sequence.tenant)
        sequence.competes = False

    def _free(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back; its engine will be told a new table."""
        if sequence.claim is not None:
            self._pool.give_back(sequence.private(0, len(sequence.table))[::-1])
            self._pool.release(sequence.claim)
        sequence.claim = None
        sequence.table = []
        sequence.copies = []
        sequence.fresh = ()
        sequence.capacity = sequence.told = sequence.computed = sequence.registered = 0

    def _set_queued(self, sequence: Sequence, tokens: int) -> None:
        change = tokens - sequence.queued
        if change:
            self.queued_tokens += change
            queued = self._queued_by.get(sequence.tenant, 0) + change
            if queued:
                self._queued_by[sequence.tenant] = queued
            else:
                del self._queued_by[sequence.tenant]
            sequence.queued = tokens

    def _tokens_to_compute(self, sequence: Sequence, hit: int) -> int:
        """Return the tokens that will probably be computed here: neither held nor expected from a source."""
        return sequence.target - max(hit * self._block_tokens, sequence.brought_tokens(hit))

    def _blocks_of(self, sequence: Sequence) -> int:
        """Return the blocks that a sequence gets at its admission (rule 1)."""
        return -(-sequence.target // self._block_tokens)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    # --- invariants -------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the sums and every sequence's own invariants."""
        followers = [follower for leader in self._admitted() for _, follower in leader.followers]
        queued = list(self._queue)
        waiting = [*queued, *followers]
        self._queue.validate()
        self._accounts.validate(Counter(one.tenant for one in (*waiting, *self._fetching.values(), *self._prefilling.values())))
        assert self.waiting == len(waiting), f"waiting {self.waiting} != queue {len(queued)} + followers {len(followers)}"
        total = sum(sequence.queued for sequence in (*waiting, *self._admitted()))
        assert self.queued_tokens == total, f"queued tokens {self.queued_tokens} != sum {total}"
        by_tenant = sum(self._queued_by.values())
        assert by_tenant == total, f"queued tokens {by_tenant} by tenant != sum {total}"
        backlog = sum(sequence.remaining_tokens for sequence in self._prefilling.values())
        assert self._backlog_tokens == backlog, f"backlog {self._backlog_tokens} != sum {backlog}"
        context = sum(sequence.computed for sequence in self._decoding.values())
        assert self.context_tokens == context, f"context tokens {self.context_tokens} != sum {context}"
        assert self.running <= self._running_max, f"running {self.running} > max {self._running_max}"
        for sequence in waiting:
            assert sequence.phase is Phase.WAITING, f"request {sequence.request} waits but is {sequence.phase.value}"
            assert not sequence.table, f"request {sequence.request} waits with {len(sequence.table)} blocks"
        for sequence in self._admitted():
            self._validate_admitted(sequence)
        for name, leader in self._leaders.items():
            assert leader.frontier == name, f"request {leader.request} leads {name!r} but comes to {leader.frontier!r}"
        self._validate_step()

    def _admitted(self) -> list[Sequence]:
        return [*self._fetching.values(), *self._prefilling.values(), *self._decoding.values()]

    def _validate_admitted(self, sequence: Sequence) -> None:
        name = f"request {sequence.request}, {sequence.phase.value}"
        blocks, size = len(sequence.table), self._block_tokens
        assert sequence.capacity == blocks * size, f"{name}: capacity {sequence.capacity} != {blocks} blocks of {size}"
        assert sequence.computed <= sequence.capacity, f"{name}: computed {sequence.computed} > capacity {sequence.capacity}"
        assert sequence.told + len(sequence.fresh) == blocks, f"{name}: told {sequence.told} of {blocks} blocks"
        assert sequence.registered <= sequence.computed // size, f"{name}: registered {sequence.registered} blocks"
        if sequence.phase is Phase.DECODING:
            held = sequence.target - 1
            assert sequence.computed == held, f"{name}: computed {sequence.computed} of {sequence.target}"
        else:
            needed = self._blocks_of(sequence)
            assert blocks == needed, f"{name}: {blocks} blocks, needs {needed}"
        assert not sequence.followers or sequence.frontier is not None, f"{name}: {len(sequence.followers)} wait for nothing"

    def _validate_step(self) -> None:
        decoding, prefilling = len(self._decoding), len(self._prefilling)
        if self.plan is None:
            assert decoding + prefilling == 0, f"no step runs for {decoding} decoding and {prefilling} prefilling"
            return
        planned = len(self.plan.decoding)
        assert planned == decoding, f"step {self.plan.step} decodes {planned} of {decoding} sequences"
        tokens = sum(part.count + part.drafts_max for part in self.plan.slices)
        for sequence, part in zip(self.plan.decoding, self.plan.slices, strict=False):
            end = part.start + part.count + part.drafts_max
            assert end <= sequence.capacity, (
                f"request {sequence.request}: {end} tokens with drafts > capacity {sequence.capacity}"
            )
        assert tokens <= self._step_tokens_max, f"step {self.plan.step} has {tokens} tokens, max {self._step_tokens_max}"
