"""The recorded mix of coding-agent sessions, scaled so that a small machine can reenact it, live and simulated."""

from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli.reenact import Scale, ScaledTurn
from orchestrator.traces import TracedTurn, read_trace

TRACE = Path(__file__).parent / "data" / "agent_mix.jsonl.gz"
#: 64 recorded tokens become 4. Token ids from 64 on are ordinary tokens of the built-in model.
SCALE = Scale(block_tokens=4, output=1 / 16, gap=0.02, token_first=64, token_count=384, gap_s_max=1.0)
BLOCK_TOKENS = 16
#: Share of all distinct blocks of the trace that one node's pool holds.
NODE_SHARE = 0.7


def distinct_blocks(turns: Sequence[ScaledTurn]) -> int:
    """Return how many KV blocks all prompts and outputs fill when equal prefixes are kept once."""
    prefixes: set[int] = set()
    for turn in turns:
        state = 0
        for start in range(0, len(turn.prompt) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            state = hash((state, turn.prompt[start : start + BLOCK_TOKENS]))
            prefixes.add(state)
    return len(prefixes) + sum(turn.output_tokens // BLOCK_TOKENS + 1 for turn in turns)


def kept(turns: Sequence[ScaledTurn], sessions: int) -> list[ScaledTurn]:
    """Return the turns of the first sessions."""
    names = list(dict.fromkeys(turn.session.partition("/")[0] for turn in turns))[:sessions]
    return [turn for turn in turns if turn.session.partition("/")[0] in names]


def traced(turns: Sequence[ScaledTurn], scale: Scale) -> list[TracedTurn]:
    """Return the scaled turns as the simulator reads them: the same blocks, of fewer tokens; no arrival but by dependency."""
    blocks = {turn.id: turn.block_runs for turn in read_trace(TRACE)}
    return [
        TracedTurn(
            id=turn.id,
            session=turn.session.partition("/")[0],
            agent=turn.agent,
            arrival_s=0.0 if turn.after else turn.gap_s,
            after=turn.after,
            gap_s=turn.gap_s,
            input_tokens=len(turn.prompt),
            output_tokens=turn.output_tokens,
            block_tokens=scale.block_tokens,
            block_runs=blocks[turn.id],
        )
        for turn in turns
    ]
