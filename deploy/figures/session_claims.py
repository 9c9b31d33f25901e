"""The article's claims about one coding session and its cache, beside the simulated session and real ones."""

from deploy.figures.caching import PLAIN, WITH_WRITES
from deploy.figures.claims import Claim, Verdict, judged
from deploy.figures.session import SessionRun, hit_rate, input_tokens
from deploy.figures.sources import (
    AGENTX_INPUT,
    API_PRICES,
    CHAT_INPUT_TOKENS,
    CHAT_OUTPUT_TOKENS,
    CHAT_REQUESTS,
    CHAT_TRACE,
    CODING_AGENTS,
    MIX_CACHED_TOKENS,
    MIX_INPUT_TOKENS,
    MULTI_AGENT,
)
from orchestrator.sim.bounds import Bound

MADE_TO = "The session was made to these numbers, so it only shows that they go together"
#: Main-agent turns over which the article sums.
EARLY_TURNS = 40
#: The hit rate of the article's sums, and how far a rounded figure ("about 85%", "roughly 6x") may be off.
STATED_HIT_RATE = 0.95
SAVING_BAND = (0.84, 0.86)
MULTIPLE_BAND = (5.5, 6.5)


def session_claims(run: SessionRun, endless: Bound) -> list[Claim]:
    """Return the claims on the session's shape, hits, bill and size; `endless` is what an endless cache saves of it."""
    return [
        _requests(run),
        _duration(run),
        _contexts(run),
        _early_input(run),
        _late_input(run),
        _hits(run, endless),
        _saving(run),
        _multiple(run),
        _chat(run),
    ]


def _requests(run: SessionRun) -> Claim:
    main, delegated, agents = len(run.main), len(run.delegated), len(run.sub_agents)
    return Claim(
        id="requests",
        text="A session is 283 requests: 58 turns of the main agent and 225 of sub-agents.",
        stated="283 = 58 + 225",
        ours=f"{main + delegated} = {main} + {delegated}, all completed",
        numbers={"requests": main + delegated, "main": main, "sub_agents": delegated, "agents": agents},
        how="requests of the bundled session that ended well in the simulator",
        verdict=Verdict.GIVEN,
        reason=f"{MADE_TO}. The article does not say how many sub-agents there were; ours has {agents}.",
    )


def _duration(run: SessionRun) -> Claim:
    minutes, waited = run.duration_s / 60, run.served_s / 60
    recorded = max(served.turn.arrival_s for served in run.served) / 60
    return Claim(
        id="duration",
        text="The session takes 33 minutes.",
        stated="33 min",
        ours=f"{minutes:.1f} min, of which the main agent waits {waited:.1f} for its own answers",
        numbers={"minutes": minutes, "recorded_minutes": recorded, "answer_minutes": waited},
        how="closed loop on the simulated cluster: every request starts its recorded pause after those before it really ended",
        verdict=Verdict.GIVEN,
        reason=f"The recorded arrivals span {recorded:.1f} min at the speed of a public API, and pauses of tools are kept as "
        f"they were. On the simulated cluster, alone, answers come sooner: {1 - minutes / recorded:.0%} of the time goes away.",
    )


def _contexts(run: SessionRun) -> Claim:
    sizes = [served.turn.input_tokens for served in run.main]
    after = sizes[run.compaction] if run.compaction < len(sizes) else None
    shown = "never compacted" if after is None else f"compacted to {after:,}"
    return Claim(
        id="contexts",
        text="The main agent's context grows from 15K to 156K tokens and is compacted to about 20K.",
        stated="15K, 156K, 20K",
        ours=f"{sizes[0]:,}, {max(sizes):,} at turn {sizes.index(max(sizes)) + 1}, {shown}",
        numbers={"first": sizes[0], "peak": max(sizes), "after": after},
        how="prompt tokens of the main agent's requests",
        verdict=Verdict.GIVEN,
        reason=f"{MADE_TO}.",
    )


def _early_input(run: SessionRun) -> Claim:
    total = input_tokens(run.main[:EARLY_TURNS])
    return Claim(
        id="early_input",
        text="The main agent's first 40 turns average 85K tokens of context and process 3.5M in all.",
        stated="85K, 3.5M",
        ours=f"{total / EARLY_TURNS / 1e3:.1f}K, {total / 1e6:.2f}M",
        numbers={"mean_tokens": total / EARLY_TURNS, "total_tokens": total},
        how="sum of the prompts of the main agent's first 40 requests",
        verdict=Verdict.GIVEN,
        reason=f"{MADE_TO}. 40 turns of 85K make 3.4M: the two stated figures agree only when rounded.",
    )


def _late_input(run: SessionRun) -> Claim:
    late = run.main[run.compaction :]
    return Claim(
        id="late_input",
        text="After the compaction another million input tokens follow.",
        stated="1M",
        ours=f"{input_tokens(late) / 1e6:.2f}M in {len(late)} turns" if late else "no compaction",
        numbers={"total_tokens": input_tokens(late), "turns": len(late)},
        how="sum of the prompts of the main agent's requests from the compaction on",
        verdict=Verdict.GIVEN,
        reason=f"{MADE_TO}. Sub-agents add {input_tokens(run.delegated) / 1e6:.2f}M, which the article does not count.",
    )


def _hits(run: SessionRun, endless: Bound) -> Claim:
    rate, main, delegated = hit_rate(run.served), hit_rate(run.main), hit_rate(run.delegated)
    real = MIX_CACHED_TOKENS / MIX_INPUT_TOKENS
    verdict, reason = judged(rate, 0.95, 0.98, "hit rate")
    return Claim(
        id="hit_rate",
        text="Coding agents find 95 to 98% of their input in the cache.",
        stated="95 to 98%",
        ours=f"{rate:.2%} (main {main:.2%}, sub-agents {delegated:.2%})",
        numbers={
            "session": rate,
            "main": main,
            "sub_agents": delegated,
            "endless_cache": endless.hit_rate,
            "real_sessions": real,
        },
        how="prompt tokens that the simulated nodes did not compute, over all prompt tokens; the cache starts empty",
        verdict=verdict,
        reason=f"{reason}; an endless cache would find {endless.hit_rate:.2%}. Real sessions lie at the low end of the claim, "
        f"below it if the cache forgets after five minutes; the first 28 requests of 16 of them find {real:.1%} at most. 98% "
        "takes longer sessions or smaller tool output. The session's sub-agents are ours: as 225 agents of one request each "
        "they would find less, since each starts cold.",
        support=(CODING_AGENTS, AGENTX_INPUT),
    )


def _saving(run: SessionRun) -> Claim:
    rate = hit_rate(run.served)
    ours, stated = PLAIN.saving(rate), PLAIN.saving(STATED_HIT_RATE)
    written = WITH_WRITES.saving(rate)
    verdict, reason = judged(stated, *SAVING_BAND, "saving at 95%")
    return Claim(
        id="input_bill",
        text="With cached tokens 90% off, a 95% hit rate takes about 85% off the input bill.",
        stated="85%",
        ours=f"{ours:.1%} at the simulated {rate:.2%}; {stated:.1%} at 95%",
        numbers={"saving": ours, "saving_at_stated": stated, "saving_with_writes": written},
        how="1 - (0.1 h + (1 - h)), h the hit rate",
        verdict=verdict,
        reason=f"{reason}. Where what is computed is also charged for being kept (1.25 times), {written:.1%} is saved.",
        support=(API_PRICES,),
    )


def _multiple(run: SessionRun) -> Claim:
    rate = hit_rate(run.served)
    ours, stated = PLAIN.multiple(rate), PLAIN.multiple(STATED_HIT_RATE)
    fitting, written = PLAIN.hit_rate_for(6.0), WITH_WRITES.multiple(STATED_HIT_RATE)
    verdict, reason = judged(stated, *MULTIPLE_BAND, "multiple at 95%")
    fits = MULTIPLE_BAND[0] <= written <= MULTIPLE_BAND[1]
    if verdict is Verdict.NOT_SUPPORTED and fits:
        verdict = Verdict.ASSUMING
    return Claim(
        id="without_caching",
        text="Without prompt caching the input would cost roughly 6 times as much.",
        stated="6x",
        ours=f"{ours:.1f}x at the simulated {rate:.2%}; {stated:.1f}x at 95%; {written:.1f}x at 95% with the write premium",
        numbers={
            "multiple": ours,
            "multiple_at_stated": stated,
            "multiple_with_writes": written,
            "hit_rate_for_6": fitting,
            "hit_rate_for_6_with_writes": WITH_WRITES.hit_rate_for(6.0),
        },
        how="1 / (0.1 h + w (1 - h)), h the hit rate, w what a computed token costs: 1, or 1.25 with the write premium",
        verdict=verdict,
        reason=f"{reason}. 6x at plain prices is a hit rate of {fitting:.1%}. "
        + (
            "At 95% it takes a provider that charges a premium for cache writes." if fits else "A write premium does not give it."
        ),
        support=(API_PRICES,),
    )


def _chat(run: SessionRun) -> Claim:
    total = input_tokens(run.served) + sum(served.output_tokens for served in run.served)
    chat_turn = (CHAT_INPUT_TOKENS + CHAT_OUTPUT_TOKENS) / CHAT_REQUESTS
    alone = input_tokens(run.main) + sum(served.output_tokens for served in run.main)
    computed = sum(served.turn.input_tokens - served.cached_tokens + served.output_tokens for served in run.served)
    turns = len(run.main)
    ratio = total / (turns * chat_turn)
    verdict, reason = judged(ratio, 12.0, 18.0, "ratio")
    return Claim(
        id="chat",
        text="Multi-agent systems take up to 15 times the tokens of a chat.",
        stated="15x",
        ours=f"{ratio:.1f}x: {total / turns / 1e3:.0f}K tokens a turn of the main agent, {chat_turn / 1e3:.1f}K a turn of a chat",
        numbers={
            "ratio": ratio,
            "tokens": total,
            "chat_turn_tokens": chat_turn,
            "main_agent_alone": total / alone,
            "computed_only": computed / (turns * chat_turn),
        },
        how="all tokens of the session, prompts and answers, over as many turns of a public chat trace as the main agent has",
        verdict=verdict,
        reason=f"{reason}, but it hangs on what a chat is, which neither source defines: against its own main agent alone the "
        f"session takes {total / alone:.1f}x, and counting only tokens that are computed {computed / (turns * chat_turn):.1f}x.",
        support=(MULTI_AGENT, CHAT_TRACE),
    )
