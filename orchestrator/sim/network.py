"""Messages and blocks on their way: latency for the first, latency and bandwidth for the second.

Messages between two ends arrive in the order in which they were sent. Blocks share the two nodes' links: each link carries one
transfer at a time, at the rate that the reading node's profile gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from orchestrator.core.commands import Fetch, SendBlocks
from orchestrator.core.events import BlocksSent, ExportClosed, ExportOpened, FetchEnded, FetchProgressed, NodeEvent
from orchestrator.core.types import ExportId, NodeId, NodeSpec, RequestId
from orchestrator.sim.agenda import Agenda
from orchestrator.sim.faults import Faults


class Network:
    """Latencies between any two ends, in order and perhaps late."""

    __slots__ = ("_agenda", "_faults", "_hop_s", "_last", "_random")

    def __init__(self, agenda: Agenda, hop_s: float, faults: Faults | None, random: Random) -> None:
        self._agenda = agenda
        self._hop_s = hop_s
        self._faults = faults
        self._random = random
        #: When the last message on a way arrives; kept only while messages may be late.
        self._last: dict[tuple[object, object], float] = {}

    def send(self, source: object, target: object, action: Callable[..., None], *arguments: Any) -> None:
        """Do something at the other end, after the latency."""
        agenda, faults = self._agenda, self._faults
        when = agenda.now + self._hop_s
        if faults is not None:
            if agenda.now < faults.until_s and self._random.random() < faults.late_share:
                when += self._random.uniform(0.0, faults.late_s_max)
            when = max(when, self._last.get((source, target), 0.0))
            self._last[source, target] = when
        agenda.at(when, action, *arguments)


@dataclass(slots=True)
class _Transfer:
    """One node's fetch from another."""

    reader: NodeSpec
    source: NodeId
    request: RequestId
    #: Prompt tokens that have arrived.
    tokens: int = 0
    #: When the last of what was put on the link arrives.
    arrives_s: float = 0.0


class Transfers:
    """Blocks on their way from node to node.

    Args:
        tell: lets something happen to a node.
        moved: told reader and bytes of what arrived.
    """

    __slots__ = (
        "_agenda", "_exports", "_faults", "_free_s", "_moved", "_network", "_of_request", "_random", "_serial", "_tell",
    )  # fmt: skip

    def __init__(
        self,
        agenda: Agenda,
        network: Network,
        tell: Callable[[NodeId, NodeEvent], None],
        moved: Callable[[NodeId, int], None],
        faults: Faults | None,
        random: Random,
    ) -> None:
        self._agenda = agenda
        self._network = network
        self._tell = tell
        self._moved = moved
        self._faults = faults
        self._random = random
        self._serial = 0
        self._exports: dict[ExportId, _Transfer] = {}
        self._of_request: dict[tuple[NodeId, RequestId], ExportId] = {}
        #: When each node's link in and link out is free again.
        self._free_s: dict[tuple[NodeId, str], float] = {}

    def __len__(self) -> int:
        return len(self._exports)

    def start(self, reader: NodeSpec, command: Fetch) -> None:
        """Ask a node for blocks."""
        self._serial += 1
        export = ExportId(self._serial)
        self._exports[export] = _Transfer(reader, command.source, command.request)
        self._of_request[reader.id, command.request] = export
        opened = ExportOpened(
            export, command.request, command.hashes, command.first_block, command.tokens, command.pending, command.incarnation
        )
        self._network.send(reader.id, command.source, self._open, export, opened)

    def stop(self, reader: NodeId, request: RequestId) -> None:
        """Give a fetch up."""
        export = self._of_request.get((reader, request))
        if export is not None:
            self._agenda.at(self._agenda.now, self._break_off, export, None)

    def carry(self, command: SendBlocks) -> None:
        """Put blocks on the link; each transfer waits for the one before it."""
        transfer = self._exports.get(command.export)
        if transfer is None:
            return
        arrives_s, size = self._agenda.now, len(command.blocks) * transfer.reader.block_bytes
        if size:
            profile, begin, end = transfer.reader.profile, (transfer.source, "out"), (transfer.reader.id, "in")
            start_s = max(arrives_s, self._free_s.get(begin, 0.0), self._free_s.get(end, 0.0))
            free_s = start_s + size / profile.fetch_bytes_per_s
            self._free_s[begin] = self._free_s[end] = free_s
            arrives_s = free_s + profile.fetch_latency_s
        # An end without blocks needs no link, and does not overtake the blocks before it.
        transfer.arrives_s = max(arrives_s, transfer.arrives_s)
        self._agenda.at(transfer.arrives_s, self._deliver, command, size)

    def drop(self, node: NodeId) -> None:
        """Break off everything that a lost node read or was read for; its links are free when it comes back."""
        for way in ("in", "out"):
            self._free_s.pop((node, way), None)
        for export, transfer in tuple(self._exports.items()):
            if node in (transfer.reader.id, transfer.source):
                self._agenda.at(self._agenda.now, self._break_off, export, f"{node} is gone")

    def _open(self, export: ExportId, opened: ExportOpened) -> None:
        transfer = self._exports.get(export)
        if transfer is not None:
            self._tell(transfer.source, opened)

    def _deliver(self, command: SendBlocks, size: int) -> None:
        transfer = self._exports.get(command.export)
        if transfer is None:
            return
        faults = self._faults
        if faults and self._agenda.now < faults.until_s and self._random.random() < faults.broken_fetch_share:
            self._break_off(command.export, "the connection broke")
            return
        transfer.tokens = command.tokens
        self._moved(transfer.reader.id, size)
        self._tell(transfer.source, BlocksSent(command.export, command.blocks))
        if not command.final:
            self._tell(transfer.reader.id, FetchProgressed(transfer.request, command.tokens))
            return
        self._close(command.export, transfer)
        self._tell(transfer.reader.id, FetchEnded(transfer.request, command.tokens, command.computed_tokens))

    def _break_off(self, export: ExportId, failure: str | None) -> None:
        transfer = self._exports.get(export)
        if transfer is not None:
            self._close(export, transfer)
            self._tell(transfer.reader.id, FetchEnded(transfer.request, transfer.tokens, failure=failure))

    def _close(self, export: ExportId, transfer: _Transfer) -> None:
        del self._exports[export]
        del self._of_request[transfer.reader.id, transfer.request]
        self._network.send(transfer.reader.id, transfer.source, self._tell, transfer.source, ExportClosed(export))
