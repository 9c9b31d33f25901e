"""Sends an answer: as one body, or as events while its tokens come; in whose words is the writer's business."""

from contextlib import aclosing

from orchestrator.live.choices import Choices
from orchestrator.live.http.dialects import Writer
from orchestrator.live.http.errors import http_error
from orchestrator.live.http.exchange import Exchange
from orchestrator.live.turns import TurnFailed


async def send_whole(exchange: Exchange, choices: Choices, writer: Writer) -> None:
    """Answer with one body. Raises `TurnFailed` before anything is sent."""
    collected = await choices.collect()
    await exchange.answer(200, writer.whole(collected, choices.usage))


async def send_events(exchange: Exchange, choices: Choices, writer: Writer) -> None:
    """Answer with events: all that came together goes out together.

    A turn that fails later on ends the stream with its error, which is then the exchange's status.

    Raises:
        TurnFailed: before anything is sent.
    """
    left = len(choices)
    async with aclosing(choices.batches()) as batches:
        try:
            async for batch in batches:
                events: list[bytes] = []
                if not exchange.streaming:
                    await exchange.open_events()
                    events += [writer.opening(index, choices.usage) for index in range(len(choices))]
                for choice, pieces in batch:
                    events += writer.events(choice.index, pieces)
                    if choice.generation.finish_reason is not None:
                        left -= 1
                        events.append(writer.ending(choice.index, choice.generation))
                if not left:
                    await exchange.close(b"".join([*events, writer.closing(choices.usage)]))
                elif data := b"".join(events):
                    await exchange.write(data)
        except TurnFailed as failure:
            if not exchange.streaming:
                raise
            error = http_error(failure)
            await exchange.close(writer.broken(error))
            exchange.status = error.status
