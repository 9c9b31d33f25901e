"""The article's claims about the shape of one coding session, beside the simulated session that was made to its totals."""

from bench.article.claim import Claim, Finding, Verdict, judged, put_in
from bench.article.session import SessionRun, input_tokens
from bench.article.study import Study

#: What the article states, and the bands of what is rounded to that.
MAIN_TURNS, SUB_AGENT_REQUESTS = 58, 225
STATED_MINUTES, MINUTES_BAND = 33, (32.5, 33.5)
FIRST_BAND, PEAK_BAND, AFTER_BAND = (14_500, 15_500), (155_500, 156_500), (19_000, 21_000)
EARLY_TURNS, EARLY_MEAN_BAND, EARLY_BAND = 40, (80_000, 90_000), (3.4e6, 3.6e6)
LATE_BAND = (0.9e6, 1.1e6)


def session_claims(run: SessionRun) -> list[Claim]:
    """Return the claims on the session's requests, time and contexts."""
    return [_requests(run), _duration(run), _contexts(run), _early_input(run), _late_input(run)]


def _requests(run: SessionRun) -> Claim:
    main, delegated, agents = len(run.main), len(run.delegated), len(run.sub_agents)
    verdict, reason = put_in((main, MAIN_TURNS, MAIN_TURNS), (delegated, SUB_AGENT_REQUESTS, SUB_AGENT_REQUESTS))
    return Claim(
        id="requests",
        text="A session is 283 requests: 58 turns of the main agent and 225 of sub-agents.",
        stated="283 = 58 + 225",
        ours=f"{main + delegated} = {main} + {delegated}, all completed",
        numbers={"requests": main + delegated, "main": main, "sub_agents": delegated, "agents": agents},
        how="requests of the bundled session; that all of them end well in the simulator is found out",
        verdict=verdict,
        reason=f"{reason}. The article does not say how many sub-agents there were; ours has {agents}.",
    )


def _duration(run: SessionRun) -> Claim:
    minutes, waited, critical = run.duration_s / 60, run.served_s / 60, run.critical_s / 60
    recorded = max(served.turn.arrival_s for served in run.served) / 60
    verdict, reason = judged(minutes, *MINUTES_BAND, "duration", Verdict.NOT_REPRODUCED)
    slower = (STATED_MINUTES - (minutes - critical)) / critical
    return Claim(
        id="duration",
        text="The session takes 33 minutes.",
        stated=f"{STATED_MINUTES} min",
        ours=f"{minutes:.1f} min, of which the main agent waits {waited:.1f} for its own answers",
        numbers={
            "minutes": minutes,
            "recorded_minutes": recorded,
            "answer_minutes": waited,
            "critical_answer_minutes": critical,
            "answers_slower_for_stated": slower,
        },
        how="closed loop on the simulated cluster: every request starts its recorded pause after those before it really ended",
        verdict=verdict,
        reason=f"{reason}. The pauses were put in: the recorded arrivals, at the speed of a public API, span {recorded:.1f} "
        f"min. The answers are found out: of the simulated session's critical path they take {critical:.1f} min, tools and "
        f"people the other {minutes - critical:.1f}. {STATED_MINUTES} min takes answers {slower:.1f} times as slow as on this "
        "cluster, alone.",
    )


def _contexts(run: SessionRun) -> Claim:
    sizes = [served.turn.input_tokens for served in run.main]
    after = sizes[run.compaction] if run.compaction < len(sizes) else None
    shown = "never compacted" if after is None else f"compacted to {after:,}"
    verdict, reason = put_in((sizes[0], *FIRST_BAND), (max(sizes), *PEAK_BAND), (after, *AFTER_BAND))
    return Claim(
        id="contexts",
        text="The main agent's context grows from 15K to 156K tokens and is compacted to about 20K.",
        stated="15K, 156K, 20K",
        ours=f"{sizes[0]:,}, {max(sizes):,} at turn {sizes.index(max(sizes)) + 1}, {shown}",
        numbers={"first": sizes[0], "peak": max(sizes), "after": after},
        how="prompt tokens of the main agent's requests",
        verdict=verdict,
        reason=f"{reason}.",
    )


def _early_input(run: SessionRun) -> Claim:
    total = input_tokens(run.main[:EARLY_TURNS])
    mean = total / EARLY_TURNS
    verdict, reason = put_in((mean, *EARLY_MEAN_BAND), (total, *EARLY_BAND))
    return Claim(
        id="early_input",
        text="The main agent's first 40 turns average 85K tokens of context and process 3.5M in all.",
        stated="85K, 3.5M",
        ours=f"{mean / 1e3:.1f}K, {total / 1e6:.2f}M",
        numbers={"mean_tokens": mean, "total_tokens": total},
        how=f"sum of the prompts of the main agent's first {EARLY_TURNS} requests",
        verdict=verdict,
        reason=f"{reason}. {EARLY_TURNS} turns of 85K make {EARLY_TURNS * 85e3 / 1e6:.1f}M: the two stated figures agree only "
        "when rounded.",
    )


def _late_input(run: SessionRun) -> Claim:
    late = run.main[run.compaction :]
    verdict, reason = put_in((input_tokens(late), *LATE_BAND))
    return Claim(
        id="late_input",
        text="After the compaction another million input tokens follow.",
        stated="1M",
        ours=f"{input_tokens(late) / 1e6:.2f}M in {len(late)} turns" if late else "no compaction",
        numbers={"total_tokens": input_tokens(late), "turns": len(late)},
        how="sum of the prompts of the main agent's requests from the compaction on",
        verdict=verdict,
        reason=f"{reason}. Sub-agents add {input_tokens(run.delegated) / 1e6:.2f}M, which the article does not count.",
    )


def find(study: Study) -> Finding:
    """Return the claims on the session's shape."""
    return Finding(tuple(session_claims(study.session)))
