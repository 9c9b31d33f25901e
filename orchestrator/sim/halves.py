"""How busy the two halves of split decode are on a simulated pool, and how much of the shorter one is hidden by micro-batches."""

from dataclasses import replace

from orchestrator.core.config import DecodeMode
from orchestrator.core.cost.machines import Machine
from orchestrator.core.cost.overlap import Halves
from orchestrator.core.cost.roofline import context_seconds, halves_at


class SplitUse:
    """One pool's split passes over the whole run, summed over its nodes; a half is as busy as each node's passes keep it."""

    __slots__ = ("_halves", "_machine", "attention_s", "exposed_s", "ffn_s", "hops_s", "passes_s")

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        #: Without their contexts, by sequences.
        self._halves: dict[int, Halves] = {}
        #: Seconds in which either half works, that activations travel, and that passes take.
        self.attention_s = 0.0
        self.ffn_s = 0.0
        self.hops_s = 0.0
        self.passes_s = 0.0
        #: Seconds of the shorter halves and of hops that are not hidden.
        self.exposed_s = 0.0

    @property
    def microbatches(self) -> int:
        return self._machine.hardware.microbatches

    @property
    def hidden_share(self) -> float | None:
        """Share of the shorter half and of the hops that passed behind the longer half; None if nothing was decoded."""
        hideable_s = self.hops_s + min(self.attention_s, self.ffn_s)
        return max(0.0, 1 - self.exposed_s / hideable_s) if hideable_s > 0.0 else None

    def add(self, passes: float, sequences: int, context_tokens: float) -> None:
        """Count so many passes of one node over equally many sequences, with this context in the mean."""
        plain = self._halves.get(sequences)
        if plain is None:
            tokens = sequences * self._machine.pass_tokens
            plain = self._halves.setdefault(sequences, halves_at(self._machine, tokens, 0.0))
        context_s = context_seconds(self._machine, sequences, context_tokens)
        halves = replace(plain, attention_s=plain.attention_s + context_s)
        seconds = halves.seconds
        self.attention_s += passes * halves.attention_s
        self.ffn_s += passes * halves.ffn_s
        self.hops_s += passes * halves.hops_s
        self.passes_s += passes * seconds
        self.exposed_s += passes * (seconds - max(halves.attention_s, halves.ffn_s))


def split_use(machine: Machine | None) -> SplitUse | None:
    """Return where to count a pool's split passes; None if its nodes do all on the same chips."""
    if machine is None or machine.hardware.mode is not DecodeMode.AFD:
        return None
    return SplitUse(machine)
