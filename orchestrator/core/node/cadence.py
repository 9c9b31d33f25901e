"""Forms the steps of a node that keeps a beat: fixed slots, no prompts, and nobody is let in who might make a step late.

    every beat      |<------------ beat_s ------------>|<------------ beat_s ------------>|
    its work        |== slot 1 == slot 2 == slot 3 ==| |== slot 1 == slot 2 == slot 3 ===||

A sequence is counted with the longest context that it may come to, and has blocks for that from the start. So the work of every
step to come is known when somebody is let in: what fits then fits until the end, nobody gives way, and no step allocates.

A prompt comes complete but for its last token, whose step is as short as any other. If it does not, it is handed back for
another node: computing it would make everybody else's beat late.
"""

from orchestrator.core.config import SchedulerConfig
from orchestrator.core.cost.costs import keeps_beat, work_seconds
from orchestrator.core.kvpool import BlockPool
from orchestrator.core.node.scheduler import Scheduler
from orchestrator.core.node.sequences import Sequence
from orchestrator.core.types import Assignment, NodeSpec, PoolKind, Role


class CadenceScheduler(Scheduler):
    """The sequences of one node that keeps a beat."""

    def __init__(self, spec: NodeSpec, config: SchedulerConfig, pool: BlockPool) -> None:
        super().__init__(spec, config, pool)
        #: Longest contexts of all sequences here, waiting ones too.
        self._reserved_tokens = 0

    @property
    def told_context_tokens(self) -> int:
        """What gateways are told of its contexts: what all sequences here may come to."""
        return self._reserved_tokens

    def refusal(self, assignment: Assignment) -> str | None:
        """Return why this node can never serve an assignment, or None if it can."""
        if assignment.role is Role.PREFILL:
            return "this node keeps a beat and computes no prompts"
        refusal = super().refusal(assignment)
        if refusal is not None:
            return refusal
        tokens = longest_context(assignment.prompt_tokens, assignment.output_tokens_max)
        if self._blocks_for(tokens) > self._pool.blocks:
            return f"a context of {tokens} tokens needs {self._blocks_for(tokens)} blocks, the pool has {self._pool.blocks}"
        if not keeps_beat(self._profile, 1, tokens):
            takes_s, beat_s = work_seconds(self._profile, 1, tokens), self._profile.beat_s
            return f"a pass over a context of {tokens} tokens takes {takes_s:.6f} s, the beat is {beat_s:.6f} s"
        return None

    def enqueue(self, assignment: Assignment) -> Sequence:
        """Let an assignment that is not refused wait for a slot."""
        sequence = super().enqueue(assignment)
        self._reserved_tokens += _longest_of(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence in any phase and give its blocks back."""
        super().remove(sequence)
        self._reserved_tokens -= _longest_of(sequence)

    def admit(self) -> list[Sequence]:
        """Admit waiting sequences in order as long as there are slots and blocks, and the beat is kept with them to their end."""
        admitted: list[Sequence] = []
        queue = self._queue
        self.short_blocks = 0
        while queue.count and self.running < self._running_max and (sequence := queue.first()) is not None:
            if not self._keeps_beat_with(sequence):
                break
            hit = self._pool.match(sequence.hashes, sequence.hit_blocks_max)
            self.short_blocks = max(0, self._blocks_short(sequence, hit))
            if self.short_blocks:
                break
            self._place(sequence, hit, sequence.brought_tokens(hit))
            admitted.append(sequence)
        if self._came:
            self._await_chains()
        return admitted

    def stranded(self) -> list[Sequence]:
        """Return the admitted sequences whose prompts did not come complete but for the last token."""
        return [sequence for sequence in self._prefilling.values() if sequence.remaining_tokens > 1]

    def _keeps_beat_with(self, sequence: Sequence) -> bool:
        contexts = sum(map(_longest_of, self._admitted())) + _longest_of(sequence)
        return keeps_beat(self._profile, self.running + 1, contexts)

    def _blocks_short(self, sequence: Sequence, hit: int) -> int:
        """Return how many blocks the pool lacks for a sequence; nobody else will need another one."""
        return self._blocks_lacking(sequence, hit, self._blocks_of(sequence) - hit)

    def _blocks_of(self, sequence: Sequence) -> int:
        """Return the blocks of a sequence's longest context: it gets no others later."""
        return self._blocks_for(_longest_of(sequence))

    def validate(self) -> None:
        """Check also that the beat is kept however long the sequences here get, and that nobody was made to give way."""
        super().validate()
        admitted = self._admitted()
        contexts = sum(map(_longest_of, admitted))
        assert not admitted or keeps_beat(self._profile, len(admitted), contexts), (
            f"{len(admitted)} sequences of up to {contexts} tokens do not keep a beat of {self._profile.beat_s} s"
        )
        everybody = contexts + sum(map(_longest_of, self._queue))
        assert self._reserved_tokens == everybody, f"reserved {self._reserved_tokens} tokens != sum {everybody}"
        assert self.preemptions == 0, f"{self.preemptions} sequences gave way on a node that keeps a beat"


def longest_context(prompt_tokens: int, output_tokens_max: int) -> int:
    """Return the most tokens whose KV a sequence comes to have: the last one that is generated needs none."""
    return prompt_tokens + output_tokens_max - 1


def _longest_of(sequence: Sequence) -> int:
    return longest_context(sequence.assignment.prompt_tokens, sequence.output_tokens_max)


def make_scheduler(spec: NodeSpec, config: SchedulerConfig, pool: BlockPool) -> Scheduler:
    """Return what forms a node's steps: on a beat in a pool of kind lpx, else for throughput."""
    made = CadenceScheduler if spec.kind is PoolKind.LPX else Scheduler
    return made(spec, config, pool)
