"""Remembers which blocks tenants' prompts were made of lately, so that what they say of a session or of blocks can be resolved.

Each tenant has its own: nobody's prompts push out another's, and nobody's blocks can be named by another. Bounded in chains and
in blocks; the chain that was quiet for longest is forgotten first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.core.types import BlockHash, ModelName, SessionId, TenantId

#: Chains that blocks given by their hashes are looked for in, the newest ones.
SEARCHED_MAX = 1024


@dataclass(frozen=True, slots=True)
class Chain:
    """A prompt's full blocks; of a session its last prompt's."""

    model: ModelName
    session: SessionId | None
    hashes: tuple[BlockHash, ...] = field(repr=False)


#: A model and a session, or a model and the last block of a prompt that belongs to none.
_Key = tuple[ModelName, SessionId | None, BlockHash | None]


class Chains:
    """What one gateway remembers of its tenants' prompts.

    Args:
        tenants: those there are; each may have an equal part.
        chains_max: chains in all.
        blocks_max: blocks in all of them.
    """

    def __init__(self, tenants: Sequence[TenantId], chains_max: int, blocks_max: int) -> None:
        self._chains_max = max(1, chains_max // len(tenants))
        self._blocks_max = blocks_max // len(tenants)
        #: Longest quiet first.
        self._chains: dict[TenantId, OrderedDict[_Key, Chain]] = {tenant: OrderedDict() for tenant in tenants}
        #: Always the sums over `_chains`.
        self._blocks = dict.fromkeys(tenants, 0)

    def blocks(self, tenant: TenantId) -> int:
        """Return how many blocks a tenant's chains have."""
        return self._blocks[tenant]

    def remember(self, tenant: TenantId, chain: Chain) -> None:
        """Note a prompt, in place of its session's last one; one that alone is too long is not kept."""
        if not chain.hashes or len(chain.hashes) > self._blocks_max:
            return
        key = chain.model, chain.session, chain.hashes[-1] if chain.session is None else None
        chains = self._chains[tenant]
        self._drop(tenant, key)
        chains[key] = chain
        self._blocks[tenant] += len(chain.hashes)
        while len(chains) > self._chains_max or self._blocks[tenant] > self._blocks_max:
            self._drop(tenant, next(iter(chains)))

    def of(self, tenant: TenantId, session: SessionId, models: Iterable[ModelName]) -> list[Chain]:
        """Return a session's chains, one for each of these models that it has asked."""
        chains = self._chains[tenant]
        found = [chains.get((model, session, None)) for model in models]
        return [chain for chain in found if chain is not None]

    def with_blocks(self, tenant: TenantId, model: ModelName, hashes: Sequence[BlockHash], first: int) -> Chain | None:
        """Return the beginning of a tenant's chain that has these blocks from block `first` on, up to the last of them."""
        end = first + len(hashes)
        for number, chain in enumerate(reversed(self._chains[tenant].values())):
            if number >= SEARCHED_MAX:
                return None
            if chain.model == model and chain.hashes[first:end] == tuple(hashes):
                return Chain(model, None, chain.hashes[:end])
        return None

    def fork(self, tenant: TenantId, parent: Chain, children: Iterable[SessionId]) -> None:
        """Let sessions that have no chain begin with another one's."""
        for child in children:
            if (parent.model, child, None) not in self._chains[tenant]:
                self.remember(tenant, Chain(parent.model, child, parent.hashes))

    def forget(self, tenant: TenantId, chain: Chain) -> None:
        """Forget a session's chain."""
        self._drop(tenant, (chain.model, chain.session, None))

    def _drop(self, tenant: TenantId, key: _Key) -> None:
        former = self._chains[tenant].pop(key, None)
        if former is not None:
            self._blocks[tenant] -= len(former.hashes)
