"""One assignment on a node: how far it has come, which blocks it has, what it still needs.

A sequence's life:

    WAITING -> FETCHING -> PREFILLING -> DECODING        role GENERATE; FETCHING only with something to load or to fetch
    WAITING -> FETCHING -> PREFILLING -> HELD            role PREFILL: its blocks are kept for the decode node
       ^-------------------- preempted ----'

and its tokens, left to right:

    |-- registered blocks --|-- computed --|-- target --|
     offered to everybody    KV is present  KV is needed before the next token is sampled
"""

from enum import Enum

from orchestrator.core.kvpool import Claim
from orchestrator.core.node.drafting import SequenceDrafts
from orchestrator.core.types import Assignment, BlockHash, BlockId, FinishReason, RequestId, Role, TenantId


class Phase(Enum):
    """Where a sequence is in its life; the values are what messages say."""

    WAITING = "waiting"
    FETCHING = "fetching"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    HELD = "held"
    GONE = "gone"


class Sequence:
    """One assignment on this node, and how far it has come."""

    __slots__ = (
        "assignment",
        "base_tokens",
        "began_at",
        "billed_tokens",
        "block_tokens",
        "capacity",
        "chunk",
        "claim",
        "competes",
        "computed",
        "copies",
        "drafts",
        "ending",
        "fetched",
        "fetched_tokens",
        "followers",
        "fresh",
        "frontier",
        "hashes",
        "heard_at",
        "hurried",
        "leader",
        "loaded",
        "loaded_cmx_tokens",
        "loaded_tokens",
        "output_tokens",
        "output_tokens_max",
        "paced_at",
        "paced_from",
        "phase",
        "present_before",
        "present_tokens",
        "queued",
        "rank",
        "registered",
        "regretted_tokens",
        "request",
        "stored_tokens",
        "table",
        "tenant",
        "told",
    )

    def __init__(self, assignment: Assignment, arrival: int, block_tokens: int, blocks_max: int, stores: bool = False) -> None:
        self.assignment = assignment
        self.request: RequestId = assignment.request
        self.tenant: TenantId = assignment.tenant
        #: Rule 2: of one tenant, a lower rank goes first. Arrivals are unique, and so are ranks.
        self.rank: tuple[int, int] = (-assignment.priority, arrival)
        self.block_tokens = block_tokens
        #: Its target before any token of output: a decode node computes a prompt's last token itself.
        self.base_tokens = assignment.prompt_tokens if assignment.role is Role.GENERATE else assignment.given_tokens - 1
        self.phase = Phase.WAITING
        #: Whether it takes part in the turns of tenants: while it waits or its prompt is being fetched or computed.
        self.competes = False
        #: What had been done for its tenant when it was admitted (`core/fairness.py`), and what was present then, tokens.
        self.began_at = 0.0
        self.present_before = 0
        #: Why it will end as soon as no step or fetch touches its blocks.
        self.ending: FinishReason | None = None
        #: Names of its full blocks, as far as known: the prompt's, then those that generated tokens completed.
        self.hashes: list[BlockHash] = list(assignment.hashes)
        #: Its blocks, first block first; each is referenced once.
        self.table: list[BlockId] = []
        #: Its claim on the cached blocks before `registered`; None while it has no blocks.
        self.claim: Claim | None = None
        #: [start, end) runs of blocks before `registered` that are second copies of cached ones, and so private.
        self.copies: list[tuple[int, int]] = []
        #: Tokens that fit into the table.
        self.capacity = 0
        #: Table entries that the engine has been told; those that the next slice tells.
        self.told = 0
        self.fresh: tuple[BlockId, ...] = ()
        #: Tokens whose KV is present. While it decodes, all but the last of prompt and output.
        self.computed = 0
        #: Prompt tokens in the running step.
        self.chunk = 0
        #: Full blocks that are offered for reuse or duplicate others that are.
        self.registered = 0
        #: Those that were generated elsewhere count: a sequence that comes with some is like one that was preempted.
        self.output_tokens = assignment.generated_tokens if assignment.role is Role.GENERATE else 0
        #: How well its drafts do; None before its first step that may have any.
        self.drafts: SequenceDrafts | None = None
        #: An output that outgrows the pool ends early: its last token needs no KV.
        self.output_tokens_max = min(assignment.output_tokens_max, blocks_max * block_tokens - assignment.prompt_tokens + 1)
        #: Prompt tokens computed here or, for this very request, on its source; none is counted again after a preemption.
        self.billed_tokens = 0
        #: Prompt tokens that have been present at some time.
        self.present_tokens = 0
        #: Its part of the load's queued tokens.
        self.queued = 0
        #: True once its source was asked, or is not needed.
        self.fetched = assignment.source is None
        #: Prompt tokens that the host's store is to bring; True once it was asked for them, or need not be.
        self.stored_tokens = assignment.stored_tokens if stores else 0
        self.loaded = not self.stored_tokens
        #: Prompt tokens that were present first because the store brought them, and how many of those came from `cmx`.
        self.loaded_tokens = 0
        self.loaded_cmx_tokens = 0
        #: Those that were present first because a peer that had them brought them.
        self.fetched_tokens = 0
        #: Prompt tokens computed here that this node had held and forgot; known once the prompt is complete.
        self.regretted_tokens = 0
        #: When its source, or the store, was last heard of, while it fetches; since when it is held.
        self.heard_at = 0.0
        #: Whether it is to be held less long, for somebody waits for its blocks.
        self.hurried = False
        #: When the running load first brought something, and the tokens that were present then; None before that.
        self.paced_at: float | None = None
        self.paced_from = 0
        #: The block it will register next; others who need it wait for it (`followers`: registered blocks needed, who).
        self.frontier: BlockHash | None = None
        self.followers: list[tuple[int, Sequence]] = []
        self.leader: Sequence | None = None

    @property
    def target(self) -> int:
        """Tokens whose KV must be present before it decodes or is handed over."""
        return self.base_tokens + self.output_tokens

    @property
    def remaining_tokens(self) -> int:
        return self.target - self.computed

    @property
    def hit_blocks_max(self) -> int:
        """Blocks that may come from the cache: a sequence that samples computes at least one token.

        Of a prompt that is scored only what this sequence has computed itself, before it was preempted.
        """
        most = (self.target if self.assignment.role is Role.PREFILL else self.target - 1) // self.block_tokens
        if self.assignment.scored and self.present_tokens < self.assignment.prompt_tokens:
            return min(most, self.present_tokens // self.block_tokens)
        return most

    @property
    def computed_tokens(self) -> int:
        """What the client is billed for as not cached."""
        return min(self.billed_tokens, self.assignment.prompt_tokens)

    @property
    def wanted_tokens(self) -> int:
        """Up to which token of the prompt the running load or fetch goes."""
        return self.fetch_tokens(0) if self.loaded else self.load_tokens(0)

    def brought_tokens(self, hit_blocks: int) -> int:
        """Return up to which token the prompt is to be loaded or fetched when `hit_blocks` are here; 0 when nothing is."""
        if self.loaded and self.fetched:
            return 0
        return max(self.load_tokens(hit_blocks), self.fetch_tokens(hit_blocks))

    def load_tokens(self, hit_blocks: int) -> int:
        """Return up to which token of the prompt to load when `hit_blocks` are here already; 0 when nothing is."""
        if self.loaded:
            return 0
        wanted = min(self.stored_tokens // self.block_tokens, self.hit_blocks_max) * self.block_tokens
        return wanted if wanted > hit_blocks * self.block_tokens else 0

    @property
    def tier_tokens(self) -> tuple[int, int, int]:
        """Prompt tokens that are reported as brought from `cpu`, `cmx` and a peer: none that a source computed after all."""
        if not self.loaded_tokens and not self.fetched_tokens:
            return 0, 0, 0
        cached = self.assignment.prompt_tokens - self.computed_tokens
        cmx_tokens = min(self.loaded_cmx_tokens, cached)
        cpu_tokens = min(self.loaded_tokens - self.loaded_cmx_tokens, cached - cmx_tokens)
        return cpu_tokens, cmx_tokens, min(self.fetched_tokens, cached - cmx_tokens - cpu_tokens)

    def fetch_tokens(self, hit_blocks: int) -> int:
        """Return up to which token of the prompt to fetch when `hit_blocks` are here already; 0 when nothing is."""
        if self.fetched:
            return 0
        if self.assignment.source_pending:
            wanted = self.assignment.given_tokens - 1
        else:
            wanted = min(self.assignment.source_tokens // self.block_tokens, self.hit_blocks_max) * self.block_tokens
        return wanted if wanted > hit_blocks * self.block_tokens else 0

    def shared_blocks(self, other: "Sequence") -> int:
        """Return how many first blocks of this sequence the other can use; equal hashes have equal hashes before them."""
        low, high = 0, min(self.target // self.block_tokens, other.hit_blocks_max, len(self.hashes), len(other.hashes))
        while low < high:
            middle = (low + high + 1) // 2
            if self.hashes[middle - 1] == other.hashes[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def private(self, first: int, end: int) -> list[BlockId]:
        """Return those of the blocks [first, end) that are not cached under their name."""
        blocks: list[BlockId] = []
        for start, stop in self.copies:
            blocks += self.table[max(first, start) : min(end, stop)]
        return blocks + self.table[max(first, self.registered) : end]

    def count_present(self, tokens: int, computed: bool = False, loaded: bool = False) -> None:
        """Note that the first `tokens` are present, and count the prompt's new ones among them as `computed` or `loaded`."""
        reached = min(tokens, self.assignment.prompt_tokens)
        if reached > self.present_tokens:
            if computed:
                self.billed_tokens += reached - self.present_tokens
            elif loaded:
                self.loaded_tokens += reached - self.present_tokens
            elif self.phase is Phase.FETCHING and self.loaded and not self.assignment.source_pending:
                self.fetched_tokens += reached - self.present_tokens
            self.present_tokens = reached
