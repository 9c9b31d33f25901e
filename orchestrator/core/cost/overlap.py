"""How two halves of a pass overlap: micro-batches go to and fro between attention and FFN, the longer half hides the other.

    one micro-batch     |- attention -|>|- FFN -|>|- attention -|>|- FFN -| ...          their sum, and every hop
    two or more         |- a1 -|- a2 -|- a1 -|- a2 -| ...                                the longer half, and what hops delay
                               >|- f1 -|>- f2 -|> ...

The same for predicted times (`roofline.py`) and for measured ones (workers).
"""

from collections.abc import Callable
from dataclasses import dataclass

#: More micro-batches are worth it only if they shorten a pass by more than this share: each has matrices of its own to read.
GAIN_MIN = 1e-3


@dataclass(frozen=True, slots=True)
class Halves:
    """Where the seconds of one pass go that two halves share."""

    #: Of all layers and all micro-batches.
    attention_s: float
    ffn_s: float
    #: One way of one micro-batch in one layer.
    hop_s: float
    microbatches: int
    layers: int

    @property
    def hops_s(self) -> float:
        """All ways of all micro-batches, one after the other."""
        return 2 * self.microbatches * self.layers * self.hop_s

    @property
    def seconds(self) -> float:
        """The pass."""
        return ping_pong_seconds(self.attention_s, self.ffn_s, self.hop_s, self.microbatches, self.layers)

    @property
    def hidden_share(self) -> float:
        """Share of the shorter half and of the hops that passes behind the longer half, 0 (all in sequence) to 1."""
        shorter_s = min(self.attention_s, self.ffn_s) + self.hops_s
        serial_s = max(self.attention_s, self.ffn_s) + shorter_s
        return max(0.0, serial_s - self.seconds) / shorter_s if shorter_s > 0.0 else 0.0


def ping_pong_seconds(first_s: float, second_s: float, hop_s: float, microbatches: int, layers: int) -> float:
    """Return the seconds of a pass in which micro-batches go to and fro between two halves in every layer.

    With T_a, T_e and T_c for one micro-batch in one layer, m micro-batches and L layers, MegaScale-Infer (arXiv 2504.02263)
    has T_a + T_e + 2 T_c + (m L - 1) max(T_a, T_e) if m is large enough to hide the hops. A micro-batch comes round after
    T_a + T_e + 2 T_c at the earliest, so that a cycle takes at least that over m; 2 T_c / m on top of the longer half bounds it
    for any m. One micro-batch is serial. Halves are given for all micro-batches and layers, the hop for one way of one.
    """
    rounds = microbatches * layers
    if microbatches == 1:
        return first_s + second_s + 2 * layers * hop_s
    cycle = max(first_s, second_s) / rounds + 2 * hop_s / microbatches
    return (first_s + second_s) / rounds + 2 * hop_s + (rounds - 1) * cycle


def choose_microbatches(seconds: Callable[[int], float], most: int) -> int:
    """Return the fewest micro-batches, up to `most`, with which a pass takes about as little time as with any number of them.

    Args:
        seconds: what a pass takes with so many, predicted or from measured halves.
        most: the largest number that is considered.
    """
    times = [seconds(count) for count in range(1, most + 1)]
    least = min(times)
    return next(count for count, one in enumerate(times, 1) if one <= least * (1 + GAIN_MIN))
