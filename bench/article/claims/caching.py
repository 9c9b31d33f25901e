"""The article's claims about what a session finds in the cache, what that saves, and how many tokens it takes beside a chat."""

from dataclasses import dataclass

from bench.article.claim import Claim, Finding, Reading, Verdict, about, agreement, judged
from bench.article.session import SessionRun, hit_rate, input_tokens, one_shot
from bench.article.sources import Source
from bench.article.study import Study
from orchestrator.sim.bounds import Bound, infinite_cache

#: What a cached prompt token costs against a fresh one, and what writing one to the cache costs (five-minute lifetime).
CACHE_READ_PRICE = 0.1
CACHE_WRITE_PRICE = 1.25
API_PRICES = Source(
    "Anthropic's price list: a cache read is 0.1 of an input token, a five-minute cache write 1.25",
    "https://platform.claude.com/docs/en/about-claude/pricing",
)

#: Chat requests of an hour of Kimi: how many, and their prompt and answer tokens; counted in the published file.
CHAT_REQUESTS, CHAT_INPUT_TOKENS, CHAT_OUTPUT_TOKENS = 12_031, 144_793_823, 4_122_048
CHAT_TRACE = Source(
    "an hour of Kimi chat, 12,031 requests: 12,035 prompt and 343 answer tokens each, counted in the published trace",
    "https://github.com/kvcache-ai/Mooncake/tree/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces",
)
MULTI_AGENT = Source(
    "Anthropic: agents take about 4 times the tokens of a chat, multi-agent systems about 15 times",
    "https://www.anthropic.com/engineering/multi-agent-research-system",
)

CODING_AGENTS = Source(
    "35,339 requests of 586 Claude Code sessions: share of the prompt blocks that were seen before, counted in November 2026 in "
    "the published traces (commits 7647c82 and 94f6046)",
    "https://github.com/callanjfox/kv-cache-tester",
)
#: What those sessions find, (least, most) over the two sets of traces, by how long a block is kept after its last use.
REAL_HIT_RATES = {
    "with an endless cache": (0.955, 0.961),
    "if a block is dropped after an hour without use": (0.952, 0.959),
    "if it is dropped after five minutes": (0.912, 0.913),
}
#: Prompt tokens of the first 28 requests of 16 of those sessions, and how many of them an endless cache finds: counted by
#: `orchestrator/sim/bounds.py` in `bench/data/agent_mix.jsonl.gz`, which is not shipped; a test counts again.
MIX_SESSIONS, MIX_REQUESTS = 16, 28
MIX_INPUT_TOKENS, MIX_CACHED_TOKENS = 34_412_246, 32_208_192
AGENTX_INPUT = Source(
    "SemiAnalysis AgentX: median prompt of 140K tokens, 99.2% of it could come from a cache",
    "https://inferencex.semianalysis.com/blog/ultra-high-interactivity-on-nvidia",
)


@dataclass(frozen=True, slots=True)
class CachePrices:
    """Prices of a prompt token in units of the plain price: found in the cache, and computed (and kept)."""

    read: float = CACHE_READ_PRICE
    write: float = 1.0

    def share(self, hit_rate: float) -> float:
        """Return the bill for prompts with caching, as a share of the bill without."""
        return self.read * hit_rate + self.write * (1.0 - hit_rate)

    def saving(self, hit_rate: float) -> float:
        """Return the share of the bill that caching saves."""
        return 1.0 - self.share(hit_rate)

    def multiple(self, hit_rate: float) -> float:
        """Return how many times the bill would be without caching."""
        return 1.0 / self.share(hit_rate)

    def hit_rate_for(self, multiple: float) -> float:
        """Return the hit rate at which the bill without caching is so many times the bill with it."""
        return (self.write - 1.0 / multiple) / (self.write - self.read)


#: As the article reckons, and with what a provider charges for keeping what was computed.
PLAIN = CachePrices()
WITH_WRITES = CachePrices(write=CACHE_WRITE_PRICE)

HIT_BAND = (0.95, 0.98)
#: The hit rate of the article's sums, and how far a rounded figure ("about 85%", "roughly 6x") may be off.
STATED_HIT_RATE = 0.95
SAVING_BAND = (0.84, 0.86)
STATED_MULTIPLE, MULTIPLE_BAND = 6.0, (5.5, 6.5)
STATED_CHAT_RATIO = 15.0


def cache_claims(run: SessionRun, endless: Bound, one_shot: Bound) -> list[Claim]:
    """Return the claims on hits, bill and size.

    Args:
        run: the simulated session.
        endless: what an endless cache saves of it.
        one_shot: the same if each of its sub-agents' requests were a new agent.
    """
    return [_hits(run, endless, one_shot), _saving(run), _multiple(run), _chat(run)]


def _hits(run: SessionRun, endless: Bound, one_shot: Bound) -> Claim:
    """Judge by real sessions: ours was made to have such a rate, so it can only spoil the claim."""
    rate, main, delegated = hit_rate(run.served), hit_rate(run.main), hit_rate(run.delegated)
    mix = MIX_CACHED_TOKENS / MIX_INPUT_TOKENS
    real = [Reading(f"586 real sessions {kept}", *rates) for kept, rates in REAL_HIT_RATES.items()]
    real.append(Reading(f"the first {MIX_REQUESTS} requests of {MIX_SESSIONS} of them, endless cache", mix, mix))
    verdict, inside, outside = agreement(real, *HIT_BAND)
    simulated, ours = judged(rate, *HIT_BAND, "simulated hit rate", Verdict.NOT_REPRODUCED)
    return Claim(
        id="hit_rate",
        text="Coding agents find 95 to 98% of their input in the cache.",
        stated="95 to 98%",
        ours=f"real sessions {min(one.low for one in real):.1%} to {max(one.high for one in real):.1%}; ours, made to, "
        f"{rate:.2%} (main {main:.2%}, sub-agents {delegated:.2%})",
        numbers={
            "session": rate,
            "main": main,
            "sub_agents": delegated,
            "endless_cache": endless.hit_rate,
            "one_shot_agents": one_shot.hit_rate,
            **{one.what: one.low for one in real},
        },
        how="prompt tokens that the simulated nodes did not compute, over all prompt tokens, the cache empty at the start; real "
        "sessions: share of their blocks (of the first requests: tokens) seen before",
        verdict=verdict if simulated is Verdict.REPRODUCED else simulated,
        reason=f"In the stated range: {_listed(inside)}. Not: {_listed(outside)}. What decides is how long a cache keeps "
        "contexts through pauses, and how long sessions last; 98% takes more than any of these, whose most is "
        f"{max(one.high for one in real):.1%}. {ours}, but the session was made to have one there; an endless cache finds "
        f"{endless.hit_rate:.2%} of it, and {one_shot.hit_rate:.1%} if its {len(run.delegated)} sub-agent requests are as many "
        "agents that start afresh, as the article's text has them.",
        support=(CODING_AGENTS, AGENTX_INPUT),
    )


def _listed(readings: list[Reading]) -> str:
    def shown(one: Reading) -> str:
        return f"{one.low:.1%}" if one.low == one.high else f"{one.low:.1%} to {one.high:.1%}"

    return ", ".join(f"{one.what} ({shown(one)})" for one in readings) or "none"


def _saving(run: SessionRun) -> Claim:
    rate = hit_rate(run.served)
    ours, stated = PLAIN.saving(rate), PLAIN.saving(STATED_HIT_RATE)
    written = WITH_WRITES.saving(rate)
    verdict, reason = judged(stated, *SAVING_BAND, f"saving at {STATED_HIT_RATE:.0%}")
    return Claim(
        id="input_bill",
        text="With cached tokens 90% off, a 95% hit rate takes about 85% off the input bill.",
        stated="85%",
        ours=f"{stated:.1%} at {STATED_HIT_RATE:.0%}; {ours:.1%} at the simulated {rate:.2%}",
        numbers={"saving": ours, "saving_at_stated": stated, "saving_with_writes": written},
        how="1 - (0.1 h + (1 - h)), h the hit rate",
        verdict=verdict,
        reason=f"{reason}. Where what is computed is also charged for being kept ({WITH_WRITES.write:g} times), {written:.1%} is "
        f"saved at the simulated {rate:.2%}.",
        support=(API_PRICES,),
    )


def _multiple(run: SessionRun) -> Claim:
    rate = hit_rate(run.served)
    ours, stated = PLAIN.multiple(rate), PLAIN.multiple(STATED_HIT_RATE)
    fitting, written = PLAIN.hit_rate_for(STATED_MULTIPLE), WITH_WRITES.multiple(STATED_HIT_RATE)
    verdict, reason = judged(stated, *MULTIPLE_BAND, f"multiple at {STATED_HIT_RATE:.0%}")
    fits = MULTIPLE_BAND[0] <= written <= MULTIPLE_BAND[1]
    if verdict is Verdict.NOT_SUPPORTED and fits:
        verdict = Verdict.ASSUMING
    premium = f"At {STATED_HIT_RATE:.0%} it takes a provider that charges a premium for cache writes."
    return Claim(
        id="without_caching",
        text="Without prompt caching the input would cost roughly 6 times as much.",
        stated="6x",
        ours=f"{stated:.1f}x at {STATED_HIT_RATE:.0%}; {written:.1f}x with the write premium; {ours:.1f}x at the simulated "
        f"{rate:.2%}",
        numbers={
            "multiple": ours,
            "multiple_at_stated": stated,
            "multiple_with_writes": written,
            "hit_rate_for_6": fitting,
            "hit_rate_for_6_with_writes": WITH_WRITES.hit_rate_for(STATED_MULTIPLE),
        },
        how="1 / (0.1 h + w (1 - h)), h the hit rate, w what a computed token costs: 1, or 1.25 with the write premium",
        verdict=verdict,
        reason=f"{reason}. {STATED_MULTIPLE:g}x at plain prices is a hit rate of {fitting:.1%}. "
        + (premium if fits else "A write premium does not give it."),
        support=(API_PRICES,),
    )


def _chat(run: SessionRun) -> Claim:
    total = input_tokens(run.served) + sum(served.output_tokens for served in run.served)
    chat_turn = (CHAT_INPUT_TOKENS + CHAT_OUTPUT_TOKENS) / CHAT_REQUESTS
    alone = input_tokens(run.main) + sum(served.output_tokens for served in run.main)
    computed = sum(served.turn.input_tokens - served.cached_tokens + served.output_tokens for served in run.served)
    turns = len(run.main)
    ratios = {
        "all tokens against as many turns of a public chat": total / (turns * chat_turn),
        "all tokens against the session's main agent alone": total / alone,
        "computed tokens against as many turns of that chat": computed / (turns * chat_turn),
    }
    readings = [Reading(what, ratio, ratio) for what, ratio in ratios.items()]
    verdict, inside, _ = agreement(readings, *about(STATED_CHAT_RATIO))
    return Claim(
        id="chat",
        text="Multi-agent systems take up to 15 times the tokens of a chat.",
        stated=f"{STATED_CHAT_RATIO:.0f}x",
        ours=", ".join(f"{one.low:.1f}x ({one.what})" for one in readings),
        numbers={
            **ratios,
            "tokens": total,
            "chat_turn_tokens": chat_turn,
            "chat_turn_for_15": total / (turns * STATED_CHAT_RATIO),
        },
        how="tokens of the session, prompts and answers, over as many turns of a public chat trace as the main agent has",
        verdict=verdict,
        reason=f"Readings that come out at about that: {len(inside)} of {len(readings)}. It hangs on what a chat is and on "
        f"whether cached tokens count, which neither source says: {STATED_CHAT_RATIO:.0f}x in all tokens is a chat of "
        f"{total / (turns * STATED_CHAT_RATIO) / 1e3:.1f}K tokens a turn; the public trace's has {chat_turn / 1e3:.1f}K.",
        support=(MULTI_AGENT, CHAT_TRACE),
    )


def find(study: Study) -> Finding:
    """Return the claims on hits, bill and size."""
    return Finding(tuple(cache_claims(study.session, infinite_cache(study.turns), infinite_cache(one_shot(study.turns)))))
