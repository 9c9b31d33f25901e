"""One node's decisions: `Node.handle(event, now)` is the only entrance; the block pool and `scheduler.py` do the two hard parts.

What happens to a request here, by role:

    GENERATE  Assigned .. [LoadBlocks .. FetchEnded] .. [Fetch .. FetchEnded] .. steps .. ReportFirstToken .. steps
              .. Forget, ReportEnded
    PREFILL   Assigned .. [LoadBlocks .. FetchEnded] .. [Fetch .. FetchEnded] .. steps
              .. Forget, ReportEnded(PREFILLED), SetTimer(hold)
              .. an export of it is fully sent and closed, or the timer fires, or Cancelled: its blocks are given back
    a fetch   Fetch, SetTimer(fetch) .. the source was silent for too long, SourceLost or Cancelled: ClearTimer, StopFetch
              .. FetchEnded: what did not come is computed here
    a load    as a fetch, from the host's store; it is late once computing would take less time than what is missing

Where there is a store, the blocks of a prompt that is complete, and of a request that ends, are offered to it:

    Offer .. [room is needed: StopOffer] .. OfferEnded

Leases keep what is cached of their chains, and what comes to be:

    LeasePlaced, SetTimer, TellLeases .. LeasePlaced (a later revision) .. LeaseEnded: ClearTimer, TellLeases; or TimerFired

Chains that gateways expect prompts of are brought while nobody waits, and kept for a while (`prefetches.py`):

    BlocksWanted, SetTimer .. [LoadBlocks .. FetchEnded] .. [Fetch .. FetchEnded] .. a request uses it, PrefetchCancelled,
                   requests need the blocks, or TimerFired: ReportPrefetchEnded

to a gateway that promised signs of life:

    GatewayHeard, SetTimer .. GatewayHeard .. TimerFired, SetTimer .. it was silent for too long: its requests end, DropGateway

and to an export (a peer reading blocks):

    pending   ExportOpened .. [SetTimer until the request is assigned] .. SendBlocks as blocks complete .. SendBlocks(final)
    other     ExportOpened .. SendBlocks(final) of what is cached
              .. BlocksSent for each .. ExportClosed

Rules for editors.

Rule 1: blocks are given back before the end is reported, so that a retry cannot overlap the cleanup.
Rule 2: a request whose blocks a step or a fetch may write to is only marked; it ends with the step or the fetch.
Rule 3: an export references what it has sent, and everything before it in the chain, until it is closed; so does an offer until
        it has ended, and neither is cut short but by its end.
"""

from typing import assert_never

from orchestrator.core.commands import (
    ClearTimer,
    DropGateway,
    Fetch,
    Forget,
    LoadBlocks,
    NodeCommand,
    PublishKv,
    ReportEnded,
    ReportFirstToken,
    RunStep,
    SendBlocks,
    SetTimer,
    StopFetch,
    StopOffer,
    TellLeases,
)
from orchestrator.core.config import CachePolicy, SchedulerConfig
from orchestrator.core.events import (
    Assigned,
    BlocksRetained,
    BlocksRetired,
    BlocksSent,
    BlocksWanted,
    Cancelled,
    DrainRequested,
    Ended,
    Expected,
    ExportClosed,
    ExportOpened,
    FetchEnded,
    FetchProgressed,
    FirstToken,
    GatewayHeard,
    GatewayLost,
    LeaseEnded,
    LeasePlaced,
    NodeEvent,
    OfferEnded,
    PrefetchCancelled,
    ResyncRequested,
    SourceLost,
    StepFailed,
    StepFinished,
    TimerFired,
)
from orchestrator.core.eviction import ValuePool
from orchestrator.core.kvpool import BlockPool, Claim, KvJournal
from orchestrator.core.node.cadence import make_scheduler
from orchestrator.core.node.leases import Leases
from orchestrator.core.node.offers import Offers
from orchestrator.core.node.prefetches import Prefetches
from orchestrator.core.node.regret import Regret
from orchestrator.core.node.scheduler import StepOutcome
from orchestrator.core.node.sequences import Phase, Sequence
from orchestrator.core.silence import Silence
from orchestrator.core.timers import ExportTimer, FetchTimer, GatewayTimer, HoldTimer, LeaseTimer, NodeTimer, PrefetchTimer
from orchestrator.core.types import (
    Assignment,
    BlockId,
    ExportId,
    FinishReason,
    GatewayId,
    Lease,
    Load,
    NodeSpec,
    PrefetchEnd,
    RequestId,
    Role,
    gateway_of,
    is_prefetch,
)

#: Peers that may read at once; each holds blocks, and one more than this computes its prompt itself.
EXPORTS_MAX = 256


class Export:
    """One peer's reading of a prompt's blocks."""

    __slots__ = ("claim", "final", "id", "in_flight", "lent", "opened", "sent", "tokens", "waits")

    def __init__(self, opened: ExportOpened) -> None:
        self.id = opened.export
        self.opened = opened
        #: Index of the block after the last one sent.
        self.sent = opened.first_block
        #: Prompt tokens that are complete at the peer once it has them all.
        self.tokens = 0
        #: Blocks handed to the driver that the peer has not copied yet.
        self.in_flight = 0
        #: Its claim on the cached blocks it has sent and all before them, and the private ones lent to it.
        self.claim: Claim | None = None
        self.lent: list[BlockId] = []
        #: True once its last blocks are handed over.
        self.final = False
        #: True while it has a timer, because its request is not here yet.
        self.waits = False

    @property
    def timer(self) -> ExportTimer:
        return ExportTimer(self.id)


class Node:
    """The state of one node. Deterministic: equal events at equal times give equal commands."""

    def __init__(self, spec: NodeSpec, config: SchedulerConfig, pool: BlockPool | None = None) -> None:
        """Make an idle node; `pool` is its empty block pool if that is to evict by another rule."""
        self.spec = spec
        self._config = config
        self._pool = pool or _pool(spec, config)
        self._journal = KvJournal(self._pool, config.resync_batches_max)
        self._scheduler = make_scheduler(spec, config, self._pool)
        self._offers = Offers(self._pool, int(spec.blocks * config.offered_share_max) if spec.stores else 0)
        self._leases = Leases(self._pool, int(spec.blocks * config.leased_share_max))
        prefetched_share_max = config.prefetched_share_max if config.prefix_caching else 0.0
        self._prefetches = Prefetches(self._pool, self._offers, spec, int(spec.blocks * prefetched_share_max))
        self._regret = Regret(spec.blocks)
        #: Everything assigned here that still has or wants blocks.
        self._sequences: dict[RequestId, Sequence] = {}
        self._exports: dict[ExportId, Export] = {}
        #: The pending ones that are not final, by the request they read.
        self._readers: dict[RequestId, list[Export]] = {}
        #: The gateways that promised signs of life.
        self._silences: dict[GatewayId, Silence] = {}
        #: Those that are set.
        self._timers: set[NodeTimer] = set()
        self._draining = False
        #: Counts what gateways should hear of beyond tokens: it stays the same while steps do nothing but decode.
        self.news = 0
        self._quiet = False
        self._now = 0.0
        self._commands: list[NodeCommand] = []

    def handle(self, event: NodeEvent, now: float) -> list[NodeCommand]:
        """Take a fact at time `now`, in seconds, and return what to do about it, in order."""
        self._now = self._pool.now = now
        self._quiet = False
        match event:
            case StepFinished():
                self._on_step_finished(event)
            case Assigned():
                self._on_assigned(event.assignment)
            case Cancelled():
                self._on_cancelled(event.request)
            case FetchProgressed():
                self._on_fetch_progressed(event)
            case FetchEnded():
                self._on_fetch_ended(event)
            case OfferEnded():
                self._offers.end(event.offer, complete=event.failure is None)
            case ExportOpened():
                self._on_export_opened(event)
            case BlocksSent():
                self._on_blocks_sent(event)
            case ExportClosed():
                self._on_export_closed(event.export)
            case TimerFired():
                self._on_timer_fired(event.key)
            case StepFailed():
                self._on_step_failed(event)
            case SourceLost():
                self._on_source_lost(event)
            case GatewayHeard():
                self._on_gateway_heard(event)
            case GatewayLost():
                self._on_gateway_lost(event.gateway)
            case ResyncRequested():
                self._on_resync_requested(event)
            case LeasePlaced():
                self._on_lease_placed(event.lease)
            case LeaseEnded():
                self._on_lease_ended(event)
            case BlocksRetained(hashes, outlook):
                self._pool.expect_chain(hashes, outlook)
            case BlocksRetired():
                self._on_blocks_retired(event)
            case BlocksWanted():
                self._on_blocks_wanted(event)
            case PrefetchCancelled(prefetch):
                self._commands += self._prefetches.stop(prefetch, PrefetchEnd.CANCELLED)
            case Expected(outlook):
                self._pool.expect(outlook)
                return []  # nothing follows from it until something must be forgotten
            case DrainRequested():
                self._draining = True
                self._commands += self._prefetches.stop_all()
            case _:
                assert_never(event)
        self._proceed()
        commands, self._commands = self._commands, []
        return commands

    @property
    def untold(self) -> bool:
        """Whether holdings changed in a way that gateways have not been told yet."""
        return self._pool.untold

    def load(self) -> Load:
        """Return the counts that the next frame to each gateway carries."""
        scheduler, pool, prefetches = self._scheduler, self._pool, self._prefetches
        return Load(
            running=scheduler.running,
            waiting=scheduler.waiting,
            queued_tokens=scheduler.queued_tokens,
            context_tokens=scheduler.told_context_tokens,
            blocks_free=pool.free_blocks,
            blocks_cached=pool.idle_blocks,
            blocks_used=pool.blocks - pool.available_blocks,
            cost_scale=scheduler.cost_scale,
            preemptions=scheduler.preemptions,
            step_s=scheduler.step_s,
            tenants=scheduler.tenants,
            blocks_leased=self._leases.blocks,
            blocks_unleased=self._leases.unclaimed_blocks,
            blocks_evicted=pool.idling.blocks,
            evicted_idle_s=pool.idling.idle_s,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_tokens=scheduler.accepted_tokens,
            prefetch_room_blocks=0 if self._draining else prefetches.room_blocks(scheduler.reserve_blocks),
            blocks_prefetched=prefetches.blocks,
            prefetched=prefetches.prefetched,
            prefetch_used=prefetches.used,
            prefetch_wasted=prefetches.wasted,
        )

    def _proceed(self) -> None:
        """Admit what can be admitted, start a step if none runs, and tell what changed in the holdings.

        Blocks that a quiet step pushed out are told of with the next news: a wrong belief costs a recompute, a message a step
        costs more.
        """
        scheduler = self._scheduler
        self._admit()
        preemptions = scheduler.preemptions
        if self._prefetches.held:
            self._proceed_with_prefetches()
        if scheduler.plan is None:
            plan = scheduler.plan_step()
            if plan is None and scheduler.waiting:  # the last one may have given way to itself; it starts over
                self._admit()
                plan = scheduler.plan_step()
            if plan is not None:
                self._commands.append(RunStep(plan.step, plan.slices, len(plan.decoding), plan.steps_max))
        if scheduler.short_blocks and not scheduler.running:
            self._hurry_held()
        if self.spec.stores:
            self._make_room()
            self._make_offers()
        if self._quiet and scheduler.preemptions == preemptions:
            return
        self.news += 1
        if self._pool.untold:
            self._tell_holdings()

    def _proceed_with_prefetches(self) -> None:
        """Let prefetches give way to what decodes, or bring more while no request waits for anything."""
        scheduler = self._scheduler
        short = scheduler.decoding - self._pool.available_blocks
        if short > 0:
            self._commands += self._prefetches.give_way(short)
        elif not (scheduler.waiting or scheduler.fetching):
            self._commands += self._prefetches.proceed(scheduler.reserve_blocks)

    def _tell_holdings(self) -> None:
        """Tell all gateways what changed in the holdings."""
        batches = self._journal.record()
        if batches:
            self._commands.append(PublishKv(batches))
        for batch in batches:
            self._regret.forgot(batch.removed)
            self._prefetches.forgot(batch.removed)
            for run in batch.stored:
                self._leases.note(run.hashes)

    def _make_room(self) -> None:
        """Stop offers if that frees the blocks that somebody waits for, or that decoding is about to need."""
        decoding = len(self._scheduler.plan.decoding) if self._scheduler.plan is not None else 0
        short = max(self._scheduler.short_blocks, decoding - self._pool.available_blocks)
        if short > 0:
            self._commands += [StopOffer(offer) for offer in self._offers.stop(short, self._now)]

    def _hurry_held(self) -> None:
        """Hold prompts less long: somebody waits for their blocks and nothing runs that could make room.

        The node that is to fetch one may wait for the prompt that waits here: then neither would go on. What is given up stays
        cached as long as it can.
        """
        for sequence in self._sequences.values():
            if sequence.phase is Phase.HELD and not sequence.hurried:
                sequence.hurried = True
                held_s = min(self._config.hold_s_max, self._config.fetch_wait_s_max)
                self._commands.append(SetTimer(HoldTimer(sequence.request), max(self._now, sequence.heard_at + held_s)))

    def _offer(self, sequence: Sequence) -> None:
        """Offer the host's store, which there is, what is cached of a sequence, before that can be forgotten."""
        self._offers.add(tuple(sequence.hashes[: sequence.registered]))
        self._make_offers()

    def _make_offers(self) -> None:
        while (offer := self._offers.next(self._now)) is not None:
            self._commands.append(offer)

    def _admit(self) -> None:
        """Admit until nobody else can be: one with nothing to compute makes room for the next; so do prefetches and leases."""
        scheduler = self._scheduler
        while admitted := scheduler.admit() or (self._admit_despite() if scheduler.short_blocks else None):
            for sequence in admitted:
                self._begin(sequence)
            if not scheduler.waiting:
                break
        for sequence in scheduler.stranded():
            missing = sequence.remaining_tokens
            self._end(sequence, FinishReason.FAILED, f"{missing} tokens of the prompt did not come, and this node computes none")

    def _admit_despite(self) -> list[Sequence]:
        """Let prefetches give way to who waits for blocks, and leases if nothing runs that could make room."""
        admitted: list[Sequence] = []
        if self._prefetches.held:
            self._commands += self._prefetches.give_way(self._scheduler.short_blocks)
            admitted = self._scheduler.admit()
        if admitted or self._prefetches.moving:  # what that has taken comes back
            return admitted
        while (short := self._scheduler.short_blocks) and not self._scheduler.running and self._leases.give_way(short):
            admitted = self._scheduler.admit()
        return admitted

    # --- requests ---------------------------------------------------------------------------------------------------------

    def _on_assigned(self, assignment: Assignment) -> None:
        """Queue an assignment, or end it at once with the reason why not."""
        former = self._sequences.get(assignment.request)
        if former is not None and former.phase is Phase.HELD:  # its decode node failed and the request starts over
            self._stop_holding(former)
        elif former is not None:  # the engine must not forget the one that is here
            self._report_refused(assignment.request, "this node still has this request")
            return
        refusal = self._refusal(assignment)
        if refusal is not None:
            self._commands.append(Forget(assignment.request))
            self._report_refused(assignment.request, refusal)
            for export in self._readers.pop(assignment.request, ()):
                self._send_cached(export)
            return
        self._sequences[assignment.request] = self._scheduler.enqueue(assignment)
        for export in self._readers.get(assignment.request, ()):
            self._stop_waiting(export)

    def _refusal(self, assignment: Assignment) -> str | None:
        if self._draining:
            return "draining"
        waiting = self._scheduler.waiting
        if waiting >= self._config.waiting_max:
            return f"queue full: {waiting} requests wait, at most {self._config.waiting_max} may"
        return self._scheduler.refusal(assignment)

    def _begin(self, sequence: Sequence) -> None:
        """Let an admitted sequence load or fetch, or hold it if everything is here already."""
        self._commands += self._prefetches.admitted(sequence.hashes, sequence.registered)
        self._advance(sequence)
        if sequence.phase is Phase.FETCHING:
            self._bring(sequence)

    def _bring(self, sequence: Sequence) -> None:
        """Ask for the blocks that follow on what is here: the host's store first, then the source."""
        assignment, first_block = sequence.assignment, sequence.registered
        tokens = sequence.wanted_tokens
        blocks = tuple(sequence.table[first_block : -(-tokens // self.spec.block_tokens)])
        command: LoadBlocks | Fetch
        if not sequence.loaded:
            command = LoadBlocks(sequence.request, assignment.hashes, first_block, blocks, tokens)
        else:
            assert assignment.source is not None, f"request {sequence.request} fetches from nowhere"
            command = Fetch(
                sequence.request,
                assignment.source,
                assignment.hashes,
                first_block,
                blocks,
                tokens,
                assignment.source_pending,
                assignment.source_incarnation,
            )
        self._commands.append(command)
        sequence.heard_at, sequence.paced_at = self._now, None
        self._await_source(sequence)

    def _on_cancelled(self, request: RequestId) -> None:
        """End a request now, or with the step or fetch that may write to its blocks (rule 2)."""
        sequence = self._sequences.get(request)
        if sequence is None or sequence.ending is not None:
            return
        if sequence.phase is Phase.HELD:
            self._stop_holding(sequence)
        elif sequence.phase is Phase.FETCHING or self._scheduler.in_step(sequence):
            sequence.ending = FinishReason.CANCELLED
            self._scheduler.abandon(sequence)
            if sequence.phase is Phase.FETCHING:
                self._stop_fetch(sequence)
        else:
            self._end(sequence, FinishReason.CANCELLED)

    def _on_gateway_lost(self, gateway: GatewayId) -> None:
        """Cancel everything that a gateway had assigned, and listen for it no more."""
        if self._silences.pop(gateway, None) is not None:
            self._timers.remove(GatewayTimer(gateway))
            self._commands.append(ClearTimer(GatewayTimer(gateway)))
        self._commands += self._prefetches.stop_all(gateway)
        for request in [request for request in self._sequences if gateway_of(request) == gateway]:
            self._on_cancelled(request)

    def _on_gateway_heard(self, event: GatewayHeard) -> None:
        self._quiet = True
        silence = self._silences.get(event.gateway)
        if silence is not None:
            silence.heard()
            return
        silence = self._silences[event.gateway] = Silence(event.lost_s, self._now)
        self._listen(event.gateway, silence)

    def _listen(self, gateway: GatewayId, silence: Silence) -> None:
        """Look again later whether a gateway was heard."""
        self._timers.add(GatewayTimer(gateway))
        self._commands.append(SetTimer(GatewayTimer(gateway), silence.look_at))

    def _on_time_to_look(self, gateway: GatewayId) -> None:
        """End what a gateway had assigned that hangs: what is computed for it is computed for nobody."""
        silence = self._silences[gateway]
        if not silence.look(self._now):
            self._quiet = True
            self._listen(gateway, silence)
            return
        del self._silences[gateway]
        self._on_gateway_lost(gateway)
        self._commands.append(DropGateway(gateway))

    def _end(self, sequence: Sequence, reason: FinishReason, message: str = "") -> None:
        """Let readers have what there is, give the blocks back, then report."""
        for export in self._readers.pop(sequence.request, ()):
            self._send(export, sequence, final=True)
        if self.spec.stores:
            self._offer(sequence)
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request]
        self._commands.append(Forget(sequence.request))
        self._report(sequence, reason, message)

    def _report(self, of: Sequence, reason: FinishReason, message: str = "") -> None:
        counts = (of.output_tokens, of.computed_tokens, message, *of.tier_tokens, of.regretted_tokens)
        self._commands.append(ReportEnded(Ended(of.request, reason, *counts)))

    def _report_refused(self, request: RequestId, message: str) -> None:
        self._commands.append(ReportEnded(Ended(request, FinishReason.FAILED, 0, 0, message)))

    def _hold(self, sequence: Sequence) -> None:
        """Report a completed PREFILL and keep its blocks for the decode node, for a while."""
        self._scheduler.hold(sequence)
        self._regret_of(sequence)
        if self.spec.stores:
            self._offer(sequence)
        self._commands.append(Forget(sequence.request))
        self._report(sequence, FinishReason.PREFILLED)
        key, sequence.heard_at = HoldTimer(sequence.request), self._now
        self._timers.add(key)
        self._commands.append(SetTimer(key, self._now + self._config.hold_s_max))

    def _stop_holding(self, sequence: Sequence) -> None:
        """Give up a held prompt before its time."""
        key = HoldTimer(sequence.request)
        self._timers.remove(key)
        self._commands.append(ClearTimer(key))
        self._drop_held(sequence)

    def _drop_held(self, sequence: Sequence) -> None:
        """Give up the blocks of a PREFILL whose end was reported when it was complete."""
        assert sequence.phase is Phase.HELD, f"request {sequence.request} is {sequence.phase.value}, not held"
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request]

    # --- steps and fetches ------------------------------------------------------------------------------------------------

    def _on_step_finished(self, event: StepFinished) -> None:
        self._check_step(event)
        outcome = self._scheduler.finish_step(event.results, event.seconds, event.steps)
        self._quiet = outcome.quiet and not self._pool.stored
        self._apply(outcome)

    def _on_step_failed(self, event: StepFailed) -> None:
        self._check_step(event)
        self._apply(self._scheduler.fail_step(event.reason))

    def _check_step(self, event: StepFinished | StepFailed) -> None:
        plan = self._scheduler.plan
        assert plan is not None, f"step {event.step} ended but none runs"
        assert plan.step == event.step, f"step {event.step} ended but step {plan.step} runs"

    def _apply(self, outcome: StepOutcome) -> None:
        """Report first tokens, serve readers of prompts that got further, end what ended."""
        for sequence in outcome.started:
            self._regret_of(sequence)
            counts = (sequence.computed_tokens, *sequence.tier_tokens, sequence.regretted_tokens)
            self._commands.append(ReportFirstToken(FirstToken(sequence.request, *counts)))
            if self.spec.stores:
                self._offer(sequence)
        for sequence in outcome.advanced:
            self._advance(sequence)
        for sequence, reason, message in outcome.ended:
            self._end(sequence, reason, message)

    def _regret_of(self, sequence: Sequence) -> None:
        """Note what of a prompt that is complete was computed here only because it had been forgotten."""
        assignment, tokens = sequence.assignment, sequence.computed_tokens
        if tokens and not assignment.source_pending:  # of those the source has computed some
            size = self.spec.block_tokens
            names = assignment.hashes[(assignment.prompt_tokens - tokens) // size : assignment.prompt_tokens // size]
            sequence.regretted_tokens = min(self._regret.computed(names) * size, tokens)

    def _advance(self, sequence: Sequence) -> None:
        """Note that more of a prompt is present: complete a PREFILL, serve its readers."""
        complete = sequence.assignment.role is Role.PREFILL and sequence.remaining_tokens == 0
        if complete and sequence.phase is Phase.PREFILLING:
            self._hold(sequence)
        if sequence.request in self._readers:
            for export in self._readers[sequence.request]:
                self._send(export, sequence, final=complete)
            self._forget_readers(sequence.request)

    def _await_source(self, sequence: Sequence) -> None:
        """Set the timer that gives the source, or the store, up if nothing more is heard of it."""
        key = FetchTimer(sequence.request)
        self._timers.add(key)
        self._commands.append(SetTimer(key, sequence.heard_at + self._patience_s(sequence)))

    def _patience_s(self, sequence: Sequence) -> float:
        """Return the seconds for which who brings blocks may be silent; a store no longer than computing would take."""
        silent_s = self._config.fetch_silent_s_max
        recompute_s = 0.0 if sequence.loaded else self._scheduler.recompute_seconds(sequence)
        return min(silent_s, recompute_s) if recompute_s > 0.0 else silent_s

    def _is_late(self, sequence: Sequence) -> bool:
        """Return whether computing what a load has not brought would take less time than it still needs at its pace."""
        if sequence.loaded or sequence.paced_at is None or sequence.computed <= sequence.paced_from:
            return False
        seconds_a_token = (self._now - sequence.paced_at) / (sequence.computed - sequence.paced_from)
        recompute_s = self._scheduler.recompute_seconds(sequence)
        return 0.0 < recompute_s < seconds_a_token * (sequence.wanted_tokens - sequence.computed)

    def _stop_fetch(self, sequence: Sequence) -> None:
        """Give a fetch up, if that has not been done; its blocks may be written to until it has ended."""
        if self._stop_awaiting(sequence):
            self._commands.append(StopFetch(sequence.request))

    def _stop_awaiting(self, sequence: Sequence) -> bool:
        """Clear the timer of a fetch; False if there is none, since it was given up already."""
        key = FetchTimer(sequence.request)
        if key not in self._timers:
            return False
        self._timers.remove(key)
        self._commands.append(ClearTimer(key))
        return True

    def _on_source_silent(self, sequence: Sequence) -> None:
        """Give a fetch up whose source has been silent for too long; one that was heard of since the timer was set may go on."""
        if sequence.heard_at + self._patience_s(sequence) > self._now:
            self._await_source(sequence)
        else:
            self._commands.append(StopFetch(sequence.request))

    def _on_source_lost(self, event: SourceLost) -> None:
        """Compute what was to come from a lost node."""
        sequence = self._sequences.get(event.request)
        if sequence is None or sequence.assignment.source != event.source:
            return
        if sequence.phase is Phase.FETCHING and sequence.loaded:
            self._stop_fetch(sequence)
        elif sequence.phase in (Phase.WAITING, Phase.FETCHING) and not sequence.fetched:
            self._scheduler.forgo_fetch(sequence)

    def _on_fetch_progressed(self, event: FetchProgressed) -> None:
        if is_prefetch(event.request):
            self._prefetches.progress(event)
            return
        sequence = self._sequences.get(event.request)
        if sequence is None or sequence.phase is not Phase.FETCHING or sequence.ending is not None:
            return
        sequence.heard_at = self._now
        self._scheduler.advance_fetch(sequence, event.tokens, event.direct)
        self._advance(sequence)
        if sequence.paced_at is None:
            sequence.paced_at, sequence.paced_from = self._now, sequence.computed
        elif self._is_late(sequence):
            self._stop_fetch(sequence)

    def _on_fetch_ended(self, event: FetchEnded) -> None:
        """Fetch or compute what did not come, or end a request that was cancelled meanwhile."""
        if is_prefetch(event.request):
            self._commands += self._prefetches.end_portion(event)
            return
        sequence = self._sequences.get(event.request)
        if sequence is None or sequence.phase is not Phase.FETCHING:
            return
        self._stop_awaiting(sequence)
        if sequence.ending is not None:
            self._end(sequence, sequence.ending)
            return
        self._scheduler.advance_fetch(sequence, event.tokens, event.direct)
        if not sequence.loaded and self._scheduler.end_load(sequence, event.cmx_tokens):
            self._begin(sequence)
            return
        self._scheduler.end_fetch(sequence, event.computed_tokens)
        self._advance(sequence)

    # --- leases and gateways ----------------------------------------------------------------------------------------------

    def _on_lease_placed(self, lease: Lease) -> None:
        """Keep a lease of this model's, and pass it on to gateways that may not know of it."""
        if lease.model == self.spec.model and self._leases.place(lease, self._now):
            key = LeaseTimer(lease.id)
            self._timers.add(key)
            self._commands.append(SetTimer(key, self._now + lease.ttl_s))
            self._commands.append(TellLeases(placed=(lease,)))

    def _on_lease_ended(self, event: LeaseEnded) -> None:
        if not self._leases.end(event.lease, event.revision):
            return
        key = LeaseTimer(event.lease)
        if key in self._timers:
            self._timers.remove(key)
            self._commands.append(ClearTimer(key))
        self._commands.append(TellLeases(ended=(event,)))

    def _on_blocks_wanted(self, event: BlocksWanted) -> None:
        """Bring blocks before a request asks for them, unless the node is about to leave."""
        reserve = self._pool.blocks if self._draining else self._scheduler.reserve_blocks
        self._commands += self._prefetches.take(event.prefetch, reserve, self._now)

    def _on_blocks_retired(self, event: BlocksRetired) -> None:
        """Let what only a dead chain has be forgotten first, or now."""
        cached = self._pool.match(event.hashes, len(event.hashes))
        if event.at_once:
            self._pool.drop(event.hashes, event.first_block, cached)
        elif cached > event.first_block:
            self._pool.retire(event.hashes[cached - 1], event.hashes[: event.first_block])

    def _on_resync_requested(self, event: ResyncRequested) -> None:
        """Tell a gateway of holdings, and one that knows of none also of all leases."""
        self._tell_holdings()  # what a quiet step left untold must not follow a snapshot that has it already
        self._commands.append(PublishKv(self._journal.since(event.after), event.gateway))
        leases, ended = self._leases.told(self._now), self._leases.ended()
        if event.after is None and (leases or ended):
            self._commands.append(TellLeases(leases, ended, event.gateway))

    # --- exports ----------------------------------------------------------------------------------------------------------

    def _on_export_opened(self, event: ExportOpened) -> None:
        """Send what is cached, or follow a request that is computed here or soon will be.

        A peer that means a former start of this node gets nothing: what it waits for is gone, and will not be computed here.
        """
        former = event.incarnation not in (None, self.spec.incarnation)
        if former or len(self._exports) >= EXPORTS_MAX:
            self._commands.append(SendBlocks(event.export, (), 0, final=True))
            return
        assert event.export not in self._exports, f"export {event.export} is open already"
        export = self._exports[event.export] = Export(event)
        if not event.pending:
            self._send_cached(export)
            return
        self._readers.setdefault(event.request, []).append(export)
        sequence = self._sequences.get(event.request)
        if sequence is not None:
            self._advance(sequence)
            return
        export.waits = True
        self._timers.add(export.timer)
        self._commands.append(SetTimer(export.timer, self._now + self._config.fetch_wait_s_max))

    def _send_cached(self, export: Export) -> None:
        """End an export with what the cache has of the wanted blocks."""
        self._stop_waiting(export)
        opened = export.opened
        matched = self._pool.match(opened.hashes, opened.tokens // self.spec.block_tokens)
        blocks: list[BlockId] = []
        if matched > export.sent:
            self._let_go(export)
            export.claim, blocks = self._pool.acquire(opened.hashes, matched)
        self._hand_over(export, blocks[export.sent :], matched * self.spec.block_tokens, final=True)

    def _send(self, export: Export, sequence: Sequence, final: bool) -> None:
        """Send a reader the blocks that are complete by now and that it has not got.

        The unfilled last one goes out of a held prompt only: no step writes to that any more. After a preemption a reader
        goes on where it was.
        """
        size = self.spec.block_tokens
        tokens = min(sequence.computed, export.opened.tokens)
        final = final or tokens == export.opened.tokens
        end = -(-tokens // size) if sequence.phase is Phase.HELD else tokens // size
        if end <= export.sent and not final:
            return
        blocks = sequence.table[export.sent : end]
        if blocks:
            self._lend(export, sequence, end)
        complete = tokens if sequence.phase is Phase.HELD else end * size
        self._hand_over(export, blocks, complete, final, sequence.computed_tokens if final else 0)

    def _lend(self, export: Export, sequence: Sequence, end: int) -> None:
        """Let an export read a sequence's blocks up to `end` even when that is gone (rule 3)."""
        private = sequence.private(export.sent, end)
        self._pool.lend(private)
        export.lent += private
        former, export.claim = export.claim, self._pool.share(sequence.claim) if sequence.claim is not None else None
        if former is not None:
            self._pool.release(former)

    def _let_go(self, export: Export) -> None:
        """Give back what an export reads."""
        if export.claim is not None:
            self._pool.release(export.claim)
        self._pool.give_back(export.lent)
        export.claim, export.lent = None, []

    def _hand_over(self, export: Export, blocks: list[BlockId], tokens: int, final: bool, computed_tokens: int = 0) -> None:
        export.sent += len(blocks)
        export.in_flight += len(blocks)
        export.tokens = max(export.tokens, tokens)
        export.final = final
        self._commands.append(SendBlocks(export.id, tuple(blocks), export.tokens, final, computed_tokens))

    def _on_blocks_sent(self, event: BlocksSent) -> None:
        export = self._exports.get(event.export)
        if export is not None:
            export.in_flight -= len(event.blocks)
            assert export.in_flight >= 0, f"export {event.export}: {-export.in_flight} blocks sent that were not handed over"

    def _on_export_closed(self, identity: ExportId) -> None:
        """Release an export's blocks, and those of its request if that was held for it."""
        export = self._exports.pop(identity, None)
        if export is None:
            return
        self._stop_waiting(export)
        self._let_go(export)
        request = export.opened.request
        if export.opened.pending and not export.final:
            export.final = True
            self._forget_readers(request)
        elif export.opened.pending and export.in_flight == 0:
            sequence = self._sequences.get(request)
            if sequence is not None and sequence.phase is Phase.HELD:
                self._stop_holding(sequence)

    def _forget_readers(self, request: RequestId) -> None:
        """Drop a request's readers that want nothing more of it."""
        readers = [export for export in self._readers.get(request, ()) if not export.final]
        if readers:
            self._readers[request] = readers
        else:
            self._readers.pop(request, None)

    def _stop_waiting(self, export: Export) -> None:
        if export.waits:
            export.waits = False
            self._timers.remove(export.timer)
            self._commands.append(ClearTimer(export.timer))

    def _on_timer_fired(self, key: NodeTimer) -> None:
        """Stop holding a prompt that nobody fetched, give a silent source up, or answer a peer whose request never came."""
        if isinstance(key, PrefetchTimer):
            self._commands += self._prefetches.stop(key.prefetch, PrefetchEnd.LAPSED)
            return
        if key not in self._timers:
            return
        self._timers.remove(key)
        match key:
            case FetchTimer(request):
                self._on_source_silent(self._sequences[request])
            case HoldTimer(request):
                self._drop_held(self._sequences[request])
            case ExportTimer(number):
                export = self._exports[number]
                export.waits = False
                self._send_cached(export)
                self._forget_readers(export.opened.request)
            case GatewayTimer(gateway):
                self._on_time_to_look(gateway)
            case LeaseTimer(lease):
                self._leases.expire(lease)
            case _:
                assert_never(key)

    # --- invariants -------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers. Dear: for tests and simulations."""
        claims: list[Claim] = []
        private: list[BlockId] = []
        for sequence in self._sequences.values():
            assert sequence.phase is not Phase.GONE, f"request {sequence.request} is gone but still listed"
            private += sequence.private(0, len(sequence.table))
            claims += [sequence.claim] if sequence.claim is not None else []
        for export in self._exports.values():
            private += export.lent
            claims += [export.claim] if export.claim is not None else []
            assert export.in_flight <= export.sent, f"export {export.id}: {export.in_flight} in flight of {export.sent} sent"
        claims += [*self._offers.claims, *self._leases.claims, *self._prefetches.claims]
        private += self._prefetches.private
        self._offers.validate()
        self._leases.validate()
        self._prefetches.validate()
        self._pool.validate(claims, private)
        self._scheduler.validate()
        self._validate_wakeups()

    def _validate_wakeups(self) -> None:
        """Check that whatever is unfinished has something running, or a timer, that will go on with it."""
        phases = [sequence.phase for sequence in self._sequences.values()]
        held, waiting = phases.count(Phase.HELD), phases.count(Phase.WAITING)
        assert waiting == self._scheduler.waiting, f"waiting {waiting} != the scheduler's {self._scheduler.waiting}"
        for sequence in self._sequences.values():
            timed = HoldTimer(sequence.request) in self._timers
            assert timed == (sequence.phase is Phase.HELD), (
                f"request {sequence.request} is {sequence.phase.value}, timer: {timed}"
            )
            awaits = FetchTimer(sequence.request) in self._timers
            assert not awaits or sequence.phase is Phase.FETCHING, f"request {sequence.request} is {sequence.phase.value}, awaits"
        for lease in self._leases.ids:
            assert LeaseTimer(lease) in self._timers, f"lease {lease} is kept for ever"
        for gateway in self._silences:
            assert GatewayTimer(gateway) in self._timers, f"gateway {gateway} is listened for and never looked at"
        for request, readers in self._readers.items():
            for export in readers:
                known = request in self._sequences
                assert export.waits != known, f"export {export.id} waits: {export.waits}, its request is here: {known}"
                assert not export.final, f"export {export.id} is final but reads on"
        running = self._scheduler.running
        pinned = held + sum(1 for export in self._exports.values() if export.claim is not None) + len(self._offers.claims)
        pinned += self._prefetches.moving
        assert running or pinned or not waiting, f"{waiting} requests wait though none runs and nothing is pinned"


def _pool(spec: NodeSpec, config: SchedulerConfig) -> BlockPool:
    """Return the pool of a node that forgets by the rule which its configuration names."""
    if config.cache is CachePolicy.LRU:
        return BlockPool(spec.blocks, config.prefix_caching)
    return ValuePool(spec.blocks, config.prefix_caching)
