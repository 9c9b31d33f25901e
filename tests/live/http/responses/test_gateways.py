"""Several gateways: a kept response is found whichever is asked, and what one kept is gone with it."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI

from orchestrator.core.types import GatewayId
from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, TENANTS, serve


@pytest.mark.slow
def test_whichever_gateway_is_asked_finds_what_one_of_them_keeps(text: ModelText) -> None:
    async def run() -> None:
        async with serve(text, 0, TENANTS) as first, serve(text, 1, TENANTS) as second:
            urls = {GatewayId(0): first.url, GatewayId(1): second.url}
            for one in (first, second):
                one.gateway.join(urls)
            async with (
                AsyncOpenAI(base_url=f"{first.url}/v1", api_key="sk-good", max_retries=0) as here,
                AsyncOpenAI(base_url=f"{second.url}/v1", api_key="sk-good", max_retries=0) as there,
                AsyncOpenAI(base_url=f"{second.url}/v1", api_key="sk-other", max_retries=0) as other,
            ):
                kept = await here.responses.create(model=MODEL, input="One")
                # The chain stays where it is kept, whatever the session it goes on in is called.
                for session in ("a", "b", "c", "d"):
                    more = await there.responses.create(
                        model=MODEL, input="Two", previous_response_id=kept.id, prompt_cache_key=session
                    )
                    assert await here.responses.retrieve(more.id) == more
                assert len(first.driver.turns) == 5
                assert second.driver.turns == []
                reference = {"type": "item_reference", "id": kept.output[0].id}
                await there.responses.create(model=MODEL, input=[reference], store=False)  # type: ignore[list-item]
                assert len(first.driver.turns) == 6
                assert await there.responses.retrieve(kept.id) == kept
                items = await there.responses.input_items.list(more.id, limit=2)
                assert (len(items.data), items.has_more) == (2, True)
                with pytest.raises(openai.NotFoundError):
                    await other.responses.retrieve(kept.id)
                await there.responses.delete(kept.id)
                with pytest.raises(openai.NotFoundError):
                    await here.responses.retrieve(kept.id)
                kept = await here.responses.create(model=MODEL, input="One")
                await first.gateway.stop()
                with pytest.raises(openai.NotFoundError):
                    await there.responses.retrieve(kept.id)
                with pytest.raises(openai.BadRequestError, match="Previous response with id"):
                    await there.responses.create(model=MODEL, input="Two", previous_response_id=kept.id)

    asyncio.run(run())
