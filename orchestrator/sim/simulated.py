"""One simulated node: the core's `Node` and an engine that computes nothing but the time its steps take.

Steps that only decode and that nothing disturbs are taken as one:

    RunStep(steps_max) ----- as many steps as end before a sequence does -----> StepFinished(steps)
                     |--step--|--step--|--step--|--step--|
                                  ^ an event: two whole steps are reported as of their end, the third is cut off from the rest
                                    and ends when it must, and the event is handled in the middle of it, as it would be live

Steps in which tokens may be drafted are taken one by one: each sequence gets another number of tokens from each, drawn by the
chance that the pool's settings name.

Blocks that several steps fill are taken at their end, which is exact for pools that forget by order of use; one that forgets by
what is expected may have chosen otherwise a little before.

See also: `workers/driver.py`, which drives a node in real time.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from orchestrator.core.commands import NodeCommand, RunStep, Slice
from orchestrator.core.cost.costs import decode_seconds, draft_seconds, step_seconds, steps_within, work_seconds
from orchestrator.core.events import Expected, NodeEvent, SliceResult, StepFinished
from orchestrator.core.node.node import Node
from orchestrator.core.node.speculation import accepted_drafts, textless_drafts
from orchestrator.core.types import BlockHash, Load, NodeSpec, RequestId
from orchestrator.sim.agenda import Agenda
from orchestrator.sim.outcome import BeatUse, Distribution, PoolUse


class Answer(Protocol):
    """What an engine must know of a request: how much comes out of it, and what the blocks of that are called."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...

    @property
    def came_tokens(self) -> int:
        """Those that came already, from a node that is gone."""
        ...

    @property
    def came_at(self) -> float:
        """When the newest of them did."""
        ...

    def generated(self) -> tuple[BlockHash, ...]:
        """Return the names of the blocks that the whole answer fills."""
        ...


class _Progress:
    """A request on this simulated."""

    __slots__ = ("answer", "token_at", "tokens")

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        #: Generated so far, here or before, and when the newest of them was.
        self.tokens = answer.came_tokens
        self.token_at = answer.came_at


class SimulatedNode:
    """One node in virtual time.

    Args:
        spec, node: what it is, and its decisions.
        agenda: the world's time.
        use, gaps_s: where its work and the times between its tokens are counted.
        obey: executes what the node orders, by `start` if it is a step; told this node, the commands and the time.
        answer: returns what is to come out of a request.
        acceptance: the chance that a drafted token is accepted.
        stepwise: take every step by itself.
    """

    __slots__ = (
        "_acceptance", "_agenda", "_answer", "_gaps_s", "_load", "_obey", "_pace", "_progress", "_run", "_slowness", "_stepwise",
        "alive", "context_tokens", "events", "news", "node", "run", "spec", "started_s", "steps", "use",
    )  # fmt: skip

    def __init__(
        self,
        spec: NodeSpec,
        node: Node,
        agenda: Agenda,
        use: PoolUse,
        gaps_s: Distribution,
        obey: "Callable[[SimulatedNode, Sequence[NodeCommand], float], None]",
        answer: Callable[[RequestId], Answer],
        acceptance: float = 0.0,
        stepwise: bool = False,
    ) -> None:
        self.spec = spec
        self.node = node
        self.use = use
        #: False once it has crashed; a new simulated takes its place.
        self.alive = True
        #: Calls of the node's `handle`.
        self.events = 0
        #: The node's news that gateways were told last.
        self.news = 0
        #: What runs, since when, for how many steps, and the context at the start; None while idle.
        self.run: RunStep | None = None
        self.started_s = 0.0
        self.steps = 0
        self.context_tokens = 0
        #: Numbers the planned ends of runs: one that was moved is stale.
        self._run = 0
        #: The steps of a run take so many times as long as they should: from the next run on, and in this one.
        self._slowness = 1.0
        self._pace = 1.0
        self._agenda = agenda
        self._gaps_s = gaps_s
        self._obey = obey
        self._answer = answer
        self._acceptance = acceptance
        self._stepwise = stepwise
        self._progress: dict[RequestId, _Progress] = {}
        #: As `load` told it last, until something happens.
        self._load: Load | None = None

    @property
    def load(self) -> Load:
        """The node's state now."""
        if self._load is None:
            self._load = self.node.load()
        return self._load

    def tell(self, event: NodeEvent) -> None:
        """Let something happen to the node now."""
        if not self.alive:
            return
        if self.steps > 1:
            self._catch_up()
        self._handle(event, self._agenda.now)
        if self.steps > 1 and not isinstance(event, Expected):  # that changes no step
            self._cut_off()

    def start(self, command: RunStep, now: float) -> None:
        """Run a step, or as many in a row as nothing can come between."""
        self.run, self.started_s, self._pace = command, now, self._slowness
        decoding = command.decoding
        chunks = command.slices[decoding:]
        context = 0
        for part in command.slices[:decoding]:
            context += part.start
        self.context_tokens = context
        # Drafts are computed like parts of prompts.
        drafts = textless_drafts(command.slices[:decoding], self.spec.draft_model)
        computed = [(count, part.start + 1) for count, part in zip(drafts, command.slices, strict=False) if count]
        computed += [(part.count, part.start) for part in chunks]
        if computed:
            drafting_s = draft_seconds(self.spec.profile, drafts) if self.spec.draft_model else 0.0
            seconds, self.steps = drafting_s + step_seconds(self.spec.profile, computed, decoding, context), 1
        else:
            self.steps = 1 if self._stepwise else min(command.steps_max, self._steps_to_an_end(command.slices))
            seconds = decode_seconds(self.spec.profile, decoding, context, self.steps)
        self._plan_end(seconds)

    def set_slowness(self, slowness: float) -> None:
        """Let the steps after the one under way take so many times as long as they should."""
        if self.steps > 1:
            self._catch_up()
        if self.steps > 1:
            self._cut_off()
        self._slowness = slowness

    def forget(self, request: RequestId) -> tuple[int, float]:
        """Drop what is kept for a request; return the tokens that it has got, and when it got the newest."""
        progress = self._progress.pop(request, None)
        return (progress.tokens, progress.token_at) if progress is not None else (0, 0.0)

    @property
    def answered(self) -> tuple[RequestId, ...]:
        """The requests that have got tokens."""
        return tuple(self._progress)

    def crash(self) -> None:
        """Stop at once; nothing of it happens any more, but tokens that it has made by now were made."""
        if self.steps > 1:
            self._deliver()
        self.alive = False
        self.run, self.steps = None, 0
        self._run += 1

    # --- steps --------------------------------------------------------------------------------------------------------

    def _plan_end(self, seconds: float) -> None:
        self._run += 1
        seconds *= self._pace
        self._agenda.at(max(self.started_s + seconds, self._agenda.now), self._end, self._run, seconds)

    def _end(self, run: int, seconds: float) -> None:
        if run == self._run and self.run is not None:
            self._finish(self.steps, seconds, self._agenda.now)

    def _catch_up(self) -> None:
        """Report the whole steps of a run that have ended by now, as of the end of the last of them."""
        ended, seconds = self._ended()
        if ended:
            self._finish(ended, seconds, self.started_s + seconds)

    def _ended(self) -> tuple[int, float]:
        """Return how many whole steps of a run have ended by now, and the seconds they took."""
        assert self.run is not None, f"{self.spec.id} has {self.steps} steps to do and runs none"
        elapsed_s = (self._agenda.now - self.started_s) / self._pace
        profile, decoding = self.spec.profile, self.run.decoding
        ended = steps_within(profile, decoding, self.context_tokens, self.steps - 1, elapsed_s)
        return ended, decode_seconds(profile, decoding, self.context_tokens, ended) * self._pace if ended else 0.0

    def _deliver(self) -> None:
        """Count the tokens of those steps, of which the node will not hear."""
        ended, seconds = self._ended()
        if not ended or self.run is None:
            return
        for part in self.run.slices:
            progress = self._of(part.request)
            progress.tokens += ended
            progress.token_at = self.started_s + seconds
        self._gaps_s.add(seconds / ended, len(self.run.slices) * ended)
        self.use.busy_s += seconds
        self.use.output_tokens += len(self.run.slices) * ended

    def _cut_off(self) -> None:
        """Let the run end with the step that is under way: what happened may change the next one."""
        assert self.run is not None, f"{self.spec.id} has {self.steps} steps to do and runs none"
        self.steps = 1
        self._plan_end(decode_seconds(self.spec.profile, self.run.decoding, self.context_tokens))

    def _finish(self, steps: int, seconds: float, at: float) -> None:
        """Tell the node what the steps of a run did, and the seconds they took: not the clock's, which are rounded."""
        command = self.run
        assert command is not None, f"{self.spec.id} finished a step but runs none"
        decoding, use = command.decoding, self.use
        results: list[SliceResult] = []
        drafts = textless_drafts(command.slices[:decoding], self.spec.draft_model)
        for index, part in enumerate(command.slices):
            if index >= decoding:
                use.prefill_tokens += part.count
                use.output_tokens += part.sample
                results.append(self._decoded(part, 1, at) if part.sample else SliceResult(part.request))
            elif drafts[index]:
                results.append(self._verified(part, drafts, index, seconds, at))
            else:
                results.append(self._decoded(part, steps, at))
        undrafted = drafts.count(0)
        if undrafted:
            self._gaps_s.add(seconds / steps, undrafted * steps)
        if use.split is not None and decoding and decoding == len(command.slices):
            context = self.context_tokens + decoding * (steps - 1) / 2
            use.split.add(steps / self.spec.profile.tokens_per_pass, decoding, context)
        if use.beat is not None:
            self._count_beats(command, use.beat, steps)
        use.busy_s += seconds
        use.output_tokens += undrafted * steps
        self.run, self.steps = None, 0
        self._handle(StepFinished(command.step, tuple(results), seconds, steps), at)

    def _count_beats(self, command: RunStep, use: BeatUse, steps: int) -> None:
        """Count the beats of a run; its last one has most work."""
        profile, slots = self.spec.profile, len(command.slices)
        context = sum([part.start for part in command.slices]) + slots * (steps - 1)
        use.add(steps / profile.tokens_per_pass, slots, work_seconds(profile, slots, context))

    def _handle(self, event: NodeEvent, at: float) -> None:
        self.events += 1
        self._load = None
        self._obey(self, self.node.handle(event, at), at)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _of(self, request: RequestId) -> _Progress:
        progress = self._progress.get(request)
        if progress is None:
            progress = self._progress[request] = _Progress(self._answer(request))
        return progress

    def _steps_to_an_end(self, slices: Sequence[Slice]) -> int:
        """Return the steps after which the first of the sequences ends."""
        return min([(progress := self._of(part.request)).answer.output_tokens - progress.tokens for part in slices])

    def _verified(self, part: Slice, drafts: Sequence[int], index: int, seconds: float, at: float) -> SliceResult:
        """Return what a sequence got of which tokens were drafted; they are told of together and counted as if evenly."""
        progress = self._of(part.request)
        drafted = drafts[index]
        wanted = min(drafted, progress.answer.output_tokens - progress.tokens - 1)
        # A draw that is a function of request and place: the same whatever else happens.
        draw = (part.request * 0x9E3779B97F4A7C15 ^ progress.tokens * 0xD1342543DE82EF95) * 0xBF58476D1CE4E5B9 >> 17
        accepted = accepted_drafts(self._acceptance, wanted, (draw & 0xFFFFFFFF) * 2.0**-32)
        tokens = 1 + accepted
        self._gaps_s.add(seconds / tokens, tokens)
        self.use.output_tokens += tokens
        result = self._decoded(part, tokens, at)
        result.drafted_tokens = drafted
        if self.spec.draft_model:
            result.drafting_s = draft_seconds(self.spec.profile, drafts) * self._pace * drafted / sum(drafts)
        return result

    def _decoded(self, part: Slice, steps: int, at: float) -> SliceResult:
        """Return what a sequence got; its answer's blocks are named when it is complete."""
        progress = self._of(part.request)
        if progress.tokens and part.count > 1:  # it was preempted, or resumed, and all was computed again: a pause for its user
            self._gaps_s.add(at - progress.token_at)
        progress.tokens += steps
        progress.token_at = at
        answer = progress.answer
        if progress.tokens < answer.output_tokens:
            return SliceResult(part.request, steps)
        return SliceResult(part.request, steps, answer.generated(), True)
