"""What routing knows of a host's store, for one model: where its blocks are in the index, how fast it brings those in each tier.

All stores share `cmx`: what is there can be had through any of them.
"""

from orchestrator.core.types import NodeId, StoredModel, StoreId, StoreLoad, StoreSpec

#: Measured rates count to so many digits: nodes whose stores are equally fast by them cost the same.
RATE_DIGITS = 1


def holder(store: StoreId) -> NodeId:
    """Return what stands for a store in the index, which tells holders apart by name: no node's has a space in it."""
    return NodeId(f"store {store}")


class StoreView:
    """One store's part for one model."""

    __slots__ = ("column", "load", "model", "rates", "spec")

    def __init__(self, spec: StoreSpec, model: StoredModel, column: int) -> None:
        self.spec = spec
        self.model = model
        #: Its bit in the index.
        self.column = column
        self.load = StoreLoad()
        #: Bytes a second from `cpu` and from `cmx`, and the seconds before the first from there, by which equal ones are equal.
        self.rates = (spec.cpu_bytes_per_s, spec.cmx_bytes_per_s, spec.cmx_latency_s)

    @property
    def holder(self) -> NodeId:
        return holder(self.spec.id)

    def report(self, load: StoreLoad) -> None:
        """Take in what the store says of itself."""
        self.load = load
        cpu_bytes_per_s = _rounded(load.cpu_bytes_per_s) or self.spec.cpu_bytes_per_s
        cmx_bytes_per_s = _rounded(load.cmx_bytes_per_s) or self.spec.cmx_bytes_per_s
        # What others wait for comes first.
        latency_s = self.spec.cmx_latency_s + _rounded(load.waiting_bytes / cmx_bytes_per_s)
        self.rates = (cpu_bytes_per_s, cmx_bytes_per_s, latency_s)


def _rounded(rate: float) -> float:
    return float(f"{rate:.{RATE_DIGITS}e}")
