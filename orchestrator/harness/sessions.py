"""One agent's session: what names it to the OpenAI or Anthropic client that asks, and what its harness knows and no server can.

    cache = CacheClient("127.0.0.1:8001", key)
    agent = Session(cache, "my-session")
    client = agent.riding(OpenAI(base_url=..., api_key=key))     # every request of it names the session
    with agent.tool_call("bash", expected_s=20):
        ...                                                      # the pause is told, and its end
    for child in agent.fork(3):
        child.riding(client).chat.completions.create(...)        # begins with the parent's context
    agent.end()

A tool call goes on whatever becomes of what is told of it; all else raises `CacheError` if nobody answers.
"""

import logging
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar, cast

from orchestrator.harness import words
from orchestrator.harness.channels import CacheError
from orchestrator.harness.client import AsyncCacheClient, CacheClient
from orchestrator.harness.words import Residency, Result, Tier

log = logging.getLogger("weft.harness")

#: Names a session, and the one that it forked from.
SESSION_HEADER = "x-session-id"
PARENT_HEADER = "x-parent-session-id"

#: `openai.OpenAI`, `openai.AsyncOpenAI`, `anthropic.Anthropic`, ...: whatever has `with_options`.
Client = TypeVar("Client")


class _Named:
    """What a session is called, and what requests of it carry."""

    def __init__(self, name: str, model: str, parent: str) -> None:
        #: Names the session on the server.
        self.name = name or uuid.uuid4().hex
        self.model = model
        self.parent = parent

    @property
    def headers(self) -> dict[str, str]:
        """What every request of the session must carry over HTTP."""
        return {SESSION_HEADER: self.name} | ({PARENT_HEADER: self.parent} if self.parent else {})

    @property
    def target(self) -> words.Target:
        """The session's context, for actions that are not here."""
        return words.session(self.name, self.model)

    def riding(self, client: Client) -> Client:
        """Return an OpenAI or Anthropic client all of whose requests belong to this session; the given one stays as it is."""
        return cast(Client, cast(Any, client).with_options(default_headers=self.headers))

    def _children(self, count: int) -> list[str]:
        return [f"{self.name}.{uuid.uuid4().hex[:8]}" for _ in range(count)]


class Session(_Named):
    """A session of a harness that blocks."""

    def __init__(self, cache: CacheClient, name: str = "", model: str = "", parent: str = "") -> None:
        super().__init__(name, model, parent)
        self._cache = cache

    def pin(self, ttl_s: float = 0.0, tier: Tier = Tier.HBM, renew: str = "") -> Result:
        """Keep the session's context; `renew` is a lease to move here instead of having another."""
        return self._cache.apply(words.pin(self.target, tier, ttl_s, renew))[0]

    def unpin(self) -> Result:
        """End the leases that were placed with this session."""
        return self._cache.apply(words.unpin(self.target))[0]

    def lookup(self) -> Residency:
        """Return where the session's context is."""
        return self._cache.lookup(self.target)[0]

    def prefetch(self, tier: Tier = Tier.HBM, deadline_s: float = 0.0) -> Result:
        """Bring the session's context up to a tier."""
        return self._cache.apply(words.prefetch(self.target, tier, deadline_s))[0]

    def compacted(self, keep_tokens: int = 0) -> Result:
        """Tell that only the first tokens of the session's last prompt go on to be used."""
        return self._cache.apply(words.supersede(self.name, keep_tokens, self.model))[0]

    def fork(self, count: int) -> "list[Session]":
        """Return new sessions that begin with this one's context; they are told of, so that they are routed to where it is."""
        children = self._children(count)
        self._cache.apply(words.fork(self.name, children, self.model))
        return [Session(self._cache, child, self.model, self.name) for child in children]

    @contextmanager
    def tool_call(self, tool_class: str, expected_s: float = 0.0) -> Generator[None]:
        """Tell that the session pauses for a tool while the block runs, and that it is back."""
        call = uuid.uuid4().hex
        self._tell(words.tool_started(self.name, tool_class, expected_s, call, self.model))
        try:
            yield
        finally:
            self._tell(words.tool_finished(self.name, call, self.model))

    def end(self) -> Result:
        """Tell that nothing more comes of the session."""
        return self._cache.apply(words.end_session(self.name, self.model))[0]

    def _tell(self, action: words.Action) -> None:
        try:
            self._cache.apply(action)
        except CacheError as error:
            log.warning("a pause of session %s was not told: %s", self.name, error)


class AsyncSession(_Named):
    """A session of a harness on asyncio."""

    def __init__(self, cache: AsyncCacheClient, name: str = "", model: str = "", parent: str = "") -> None:
        super().__init__(name, model, parent)
        self._cache = cache

    async def pin(self, ttl_s: float = 0.0, tier: Tier = Tier.HBM, renew: str = "") -> Result:
        """Keep the session's context; `renew` is a lease to move here instead of having another."""
        return (await self._cache.apply(words.pin(self.target, tier, ttl_s, renew)))[0]

    async def unpin(self) -> Result:
        """End the leases that were placed with this session."""
        return (await self._cache.apply(words.unpin(self.target)))[0]

    async def lookup(self) -> Residency:
        """Return where the session's context is."""
        return (await self._cache.lookup(self.target))[0]

    async def prefetch(self, tier: Tier = Tier.HBM, deadline_s: float = 0.0) -> Result:
        """Bring the session's context up to a tier."""
        return (await self._cache.apply(words.prefetch(self.target, tier, deadline_s)))[0]

    async def compacted(self, keep_tokens: int = 0) -> Result:
        """Tell that only the first tokens of the session's last prompt go on to be used."""
        return (await self._cache.apply(words.supersede(self.name, keep_tokens, self.model)))[0]

    async def fork(self, count: int) -> "list[AsyncSession]":
        """Return new sessions that begin with this one's context; they are told of, so that they are routed to where it is."""
        children = self._children(count)
        await self._cache.apply(words.fork(self.name, children, self.model))
        return [AsyncSession(self._cache, child, self.model, self.name) for child in children]

    @asynccontextmanager
    async def tool_call(self, tool_class: str, expected_s: float = 0.0) -> AsyncGenerator[None]:
        """Tell that the session pauses for a tool while the block runs, and that it is back."""
        call = uuid.uuid4().hex
        await self._tell(words.tool_started(self.name, tool_class, expected_s, call, self.model))
        try:
            yield
        finally:
            await self._tell(words.tool_finished(self.name, call, self.model))

    async def end(self) -> Result:
        """Tell that nothing more comes of the session."""
        return (await self._cache.apply(words.end_session(self.name, self.model)))[0]

    async def _tell(self, action: words.Action) -> None:
        try:
            await self._cache.apply(action)
        except CacheError as error:
            log.warning("a pause of session %s was not told: %s", self.name, error)
