"""Makes up sessions of coding agents, as many as wanted, that are like real ones in length, growth, pauses and sharing.

A session is a main agent that may start sub-agents. Its context grows with every turn by what was answered and what tools and
users added; now and then part of it is rewritten; where it no longer fits it is compacted to a summary behind the instructions
that it began with. Sessions of a family begin with the same instructions, and so do sub-agents of a kind.

The distributions are those of 586 recorded Claude Code sessions with 35,339 requests (kv-cache-tester, v6 and v8 sets,
Apache-2.0, https://github.com/callanjfox/kv-cache-tester, commits 7647c82 and 94f6046), measured on 2026-11-24: shares are
counted, and of each quantity the values at `LEVELS` are kept. What is not kept is how quantities depend on each other.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import exp, log

from orchestrator.sim.names import between
from orchestrator.traces import TracedTurn, TraceError, interleaved
from orchestrator.traces.turns import merged

#: How `weft simulate --trace` names such sessions, followed by settings: `synthetic:sessions=100,seed=1`.
PREFIX = "synthetic:"
#: About 60 requests each.
SESSIONS_MAX = 1_000_000
#: Shares of all values that lie below the values of a `Quantiles`.
LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution, known at `LEVELS`; between them it is straight on a logarithmic scale where that exists."""

    values: Sequence[float]

    def draw(self, chance: random.Random) -> float:
        """Return one value."""
        level = chance.random()
        for (low, low_value), (high, high_value) in pairwise(zip(LEVELS, self.values, strict=True)):
            if level <= high:
                share = (level - low) / (high - low)
                if low_value > 0:
                    return exp(log(low_value) + share * (log(high_value) - log(low_value)))
                return low_value + share * (high_value - low_value)
        raise AssertionError(f"level {level} is above all of {LEVELS}")


#: Turns of a main agent and of a sub-agent.
MAIN_TURNS = Quantiles((1, 1, 4, 5, 14, 37, 81, 125, 174, 289, 454, 514))
SUB_TURNS = Quantiles((1, 1, 1, 1, 1, 6, 11, 19, 35.4, 71, 79, 81))
#: Tokens of the first prompt: in models with the usual context, in those with a wide one, of a sub-agent.
FIRST_TOKENS = Quantiles((6343, 9004, 12070, 12680, 17960, 21110, 65100, 110200, 126700, 149300, 158400, 159900))
FIRST_TOKENS_WIDE = Quantiles((12250, 12580, 14010, 17090, 23420, 235700, 326100, 494900, 592700, 844500, 851200, 851900))
FIRST_TOKENS_SUB = Quantiles((3318, 6377, 6419, 9016, 11130, 13190, 48940, 107100, 140700, 180100, 627200, 697400))
#: Tokens that tools and users add between an answer and the next prompt.
ADDED_TOKENS = Quantiles((0, 3, 15, 25, 89, 367, 1348, 3837, 6859, 17950, 77640, 222500))
ADDED_TOKENS_SUB = Quantiles((0, 8, 26, 48.8, 239, 927, 3094, 7257, 14460, 42570, 67270, 71530))
OUTPUT_TOKENS = Quantiles((0, 57, 89, 105, 139, 214, 413, 850, 1434, 3555, 8246, 18200))
#: Seconds between the end of a turn and the start of the next: tools, or somebody who thinks; not more than a day.
GAP_S = Quantiles((0, 0, 0, 0.03, 0.3, 1.68, 15.08, 118.4, 284, 1951, 13820, 86400))
GAP_S_SUB = Quantiles((0, 0, 0, 0, 0.15, 0.52, 2.88, 51.5, 196.8, 1697, 4127, 4307))
#: Where an answer is not kept whole (its reasoning is dropped): the share of it that goes.
DROPPED_SHARE = Quantiles((0.0006, 0.0033, 0.0095, 0.017, 0.04, 0.077, 0.132, 0.229, 0.387, 0.73, 0.95, 0.97))
#: Where a context is rewritten: the tokens at its end that go.
REWRITTEN_TOKENS = Quantiles((64, 64, 64, 64, 65, 79, 5512, 103600, 131900, 160800, 431000, 586700))
#: Tokens of the prompt before and after a compaction. The widest context seen had 879K.
COMPACTED_FROM = Quantiles((103300, 108900, 120400, 141100, 147600, 155200, 162000, 164700, 167900, 194100, 305600, 319700))
COMPACTED_TO = Quantiles((12810, 12920, 21190, 24180, 27340, 32000, 39550, 48640, 55020, 58500, 67370, 68520))
WIDE_TOKENS = 879_000
#: Tokens of instructions and tool descriptions that sessions, and sub-agents, have in common with earlier ones.
SHARED_TOKENS = Quantiles((64, 253, 2176, 7040, 9344, 14980, 15550, 16450, 18180, 68600, 99280, 104300))
SHARED_TOKENS_SUB = Quantiles((64, 128, 256, 730, 7200, 10180, 12290, 20580, 40000, 100000, 140000, 150300))
#: Families of sessions and kinds of sub-agents in each: the captures came from nine places; four kinds of agents were told apart.
FAMILIES = 9
SUB_KINDS = 4
#: Shares: of sessions with a wide context, with sub-agents; of turns that drop part of the answer, that rewrite the context; of
#: contexts that no longer fit, those compacted: the other sessions end there.
WIDE_SHARE = 104 / 586
FORKING_SHARE = 96 / 586
DROPPING_SHARE = 3513 / 32959
REWRITING_SHARE = 2231 / 32959
COMPACTING_SHARE = 102 / (102 + 175)
#: Sessions with so many groups of sub-agents, 1 and up; groups of so many sub-agents, 1 and up, at work side by side.
GROUPS = (64, 22, 8, 2)
GROUP_WIDTHS = (85, 43, 4, 1)
#: Seconds that a recorded request took: fixed, an answered token, a prompt token (least squares). They order arrivals.
REQUEST_S, REQUEST_S_OUTPUT, REQUEST_S_INPUT = 1.29, 0.01475, 1.416e-5


@dataclass(frozen=True, slots=True)
class SyntheticOptions:
    """What sessions are wanted."""

    sessions: int
    seed: int = 0
    #: Mean seconds between the starts of two sessions.
    start_s: float = 20.0
    #: Longer pauses are cut to this.
    gap_s_max: float = 3600.0
    block_tokens: int = 64


@dataclass(slots=True)
class _Agent:
    """One agent's context so far."""

    name: str
    tokens: int
    #: Names of its full blocks, and how many they are.
    runs: tuple[tuple[int, int], ...] = ()
    blocks: int = 0
    last: TracedTurn | None = None
    ended_s: float = 0.0


@dataclass(slots=True)
class _Maker:
    """Makes one trace."""

    options: SyntheticOptions
    chance: random.Random
    turns: list[TracedTurn] = field(default_factory=lambda: [])
    name_next: int = 0
    #: Instructions of each family, and of its kinds of sub-agents, as (first block, tokens).
    instructions: list[list[tuple[int, int]]] = field(default_factory=lambda: [])

    # --- blocks -------------------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> int:
        first = self.name_next
        self.name_next += count
        return first

    def make_families(self) -> None:
        """Write the instructions that sessions share."""
        for _ in range(FAMILIES):
            sizes = [SHARED_TOKENS, *[SHARED_TOKENS_SUB] * SUB_KINDS]
            tokens = [int(size.draw(self.chance)) for size in sizes]
            self.instructions.append([(self.fresh(count // self.options.block_tokens + 1), count) for count in tokens])

    def grow(self, agent: _Agent, tokens: int) -> None:
        """Set a context's length; blocks that fill get new names, those beyond are forgotten."""
        blocks = tokens // self.options.block_tokens
        if blocks < agent.blocks:
            agent.runs = tuple(between(agent.runs, 0, blocks))
        elif blocks > agent.blocks:
            agent.runs = merged((*agent.runs, (self.fresh(blocks - agent.blocks), blocks - agent.blocks)))
        agent.tokens, agent.blocks = tokens, blocks

    def begin(self, name: str, instructions: tuple[int, int], tokens: int, start_s: float) -> _Agent:
        """Return an agent whose context begins with shared instructions."""
        agent = _Agent(name, 0, ended_s=start_s)
        self.grow(agent, 0)
        self._instruct(agent, instructions, tokens)
        self.grow(agent, tokens)
        return agent

    def _instruct(self, agent: _Agent, instructions: tuple[int, int], tokens: int) -> None:
        first, shared = instructions
        agent.blocks = min(shared, tokens) // self.options.block_tokens
        agent.runs = ((first, agent.blocks),) if agent.blocks else ()

    # --- turns --------------------------------------------------------------------------------------------------------

    def turn(self, session: str, agent: _Agent, after: Sequence[_Agent], gap_s: float, seam: bool = False) -> None:
        """Let an agent have its next turn when others, or itself, have ended."""
        waits = [other.last.id for other in after if other.last is not None]
        arrival_s = max((other.ended_s for other in after), default=agent.ended_s) + gap_s
        output = int(OUTPUT_TOKENS.draw(self.chance))
        turn = TracedTurn(
            id=len(self.turns),
            session=session,
            agent=agent.name,
            arrival_s=arrival_s,
            after=tuple(waits),
            gap_s=gap_s,
            input_tokens=max(agent.tokens, 1),
            output_tokens=max(output, 1),
            block_tokens=self.options.block_tokens,
            block_runs=agent.runs,
            seam=seam,
        )
        self.turns.append(turn)
        agent.last = turn
        agent.ended_s = arrival_s + REQUEST_S + REQUEST_S_OUTPUT * turn.output_tokens + REQUEST_S_INPUT * turn.input_tokens

    def advance(self, agent: _Agent, instructions: tuple[int, int], added: int, tokens_max: int) -> bool:
        """Bring a context to where the next turn begins; return True if it was rewritten."""
        assert agent.last is not None, f"agent {agent.name} has had no turn yet"
        output, kind = agent.last.output_tokens, self.chance.random()
        if kind < REWRITING_SHARE:
            self.grow(agent, max(agent.tokens - int(REWRITTEN_TOKENS.draw(self.chance)), 0))
            tokens = agent.last.input_tokens + output + added
        elif kind < REWRITING_SHARE + DROPPING_SHARE:
            tokens = agent.tokens + output - int(output * DROPPED_SHARE.draw(self.chance))
        else:
            tokens = agent.tokens + output + added
        if tokens <= tokens_max:
            self.grow(agent, tokens)
            return kind < REWRITING_SHARE
        tokens = min(int(COMPACTED_TO.draw(self.chance)), tokens_max)
        self._instruct(agent, instructions, tokens)
        self.grow(agent, tokens)
        return True

    def gap(self, gaps: Quantiles) -> float:
        return min(gaps.draw(self.chance), self.options.gap_s_max)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def session(self, number: int) -> None:
        """Make one session, on a clock of its own."""
        chance, name = self.chance, f"synthetic-{number}"
        family = chance.choice(self.instructions)
        wide = chance.random() < WIDE_SHARE
        tokens_max = WIDE_TOKENS if wide else int(COMPACTED_FROM.draw(chance))
        first = int((FIRST_TOKENS_WIDE if wide else FIRST_TOKENS).draw(chance))
        main = self.begin("main", family[0], min(first, tokens_max), 0.0)
        turns = max(1, round(MAIN_TURNS.draw(chance)))
        forks = self._forks(turns)
        self.turn(name, main, (), 0.0)
        for turn in range(1, turns):
            added = int(ADDED_TOKENS.draw(chance))
            if main.tokens + added > tokens_max and chance.random() >= COMPACTING_SHARE:
                return
            subs = self._group(name, main, family, turn, forks.count(turn), tokens_max)
            seam = self.advance(main, family[0], added, tokens_max)
            self.turn(name, main, subs or [main], self.gap(GAP_S), seam)

    def _forks(self, turns: int) -> list[int]:
        """Return before which turns sub-agents are at work, once for each."""
        if turns < 2 or self.chance.random() >= FORKING_SHARE:
            return []
        groups = _count(GROUPS, self.chance)
        places = [self.chance.randrange(1, turns) for _ in range(groups)]
        return [place for place in places for _ in range(_count(GROUP_WIDTHS, self.chance))]

    def _group(
        self, session: str, main: _Agent, family: Sequence[tuple[int, int]], turn: int, width: int, tokens_max: int
    ) -> list[_Agent]:
        """Let sub-agents work side by side, from the main agent's last turn on, and return them."""
        agents: list[_Agent] = []
        for index in range(width):
            instructions = self.chance.choice(family[1:])
            first = min(int(FIRST_TOKENS_SUB.draw(self.chance)), tokens_max)
            agent = self.begin(f"sub-{turn}.{index}", instructions, first, main.ended_s)
            self.turn(session, agent, [main], self.gap(GAP_S_SUB))
            for _ in range(round(SUB_TURNS.draw(self.chance)) - 1):
                seam = self.advance(agent, instructions, int(ADDED_TOKENS_SUB.draw(self.chance)), tokens_max)
                self.turn(session, agent, [agent], self.gap(GAP_S_SUB), seam)
            agents.append(agent)
        return agents


def _count(shares: Sequence[int], chance: random.Random) -> int:
    """Return 1 or more, each as often as `shares` says."""
    return chance.choices(range(1, len(shares) + 1), shares)[0]


def synthetic_trace(options: SyntheticOptions) -> list[TracedTurn]:
    """Return the turns of made-up sessions, in order of arrival on one clock. Equal options give equal turns."""
    maker = _Maker(options, random.Random(options.seed))
    maker.make_families()
    for number in range(options.sessions):
        maker.session(number)
    return interleaved(maker.turns, options.start_s, options.seed)


def parse_synthetic(text: str) -> list[TracedTurn]:
    """Return the sessions that a text like `synthetic:sessions=100,seed=1` asks for. Raises `TraceError` naming the setting.

    Settings are the fields of `SyntheticOptions`; only `sessions` is needed.
    """
    given = dict(_settings(text.removeprefix(PREFIX)))
    if "sessions" not in given:
        raise TraceError(f"sessions: missing; say how many, as in {PREFIX}sessions=100")
    usual = SyntheticOptions(sessions=int(given["sessions"]))
    return synthetic_trace(
        replace(
            usual,
            seed=int(given.get("seed", usual.seed)),
            start_s=given.get("start_s", usual.start_s),
            gap_s_max=given.get("gap_s_max", usual.gap_s_max),
            block_tokens=int(given.get("block_tokens", usual.block_tokens)),
        )
    )


#: The least that each setting may be, and whether it is a whole number.
SETTINGS = {"sessions": (1, True), "seed": (0, True), "start_s": (0, False), "gap_s_max": (0, False), "block_tokens": (1, True)}


def _settings(text: str) -> Iterator[tuple[str, float]]:
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in SETTINGS:
            raise TraceError(f"{name or 'nothing'}: not a setting; there are {', '.join(SETTINGS)}, as name=value")
        least, whole = SETTINGS[name]
        try:
            number = int(value) if whole else float(value)
        except ValueError:
            number = None
        if number is None or not least <= number < float("inf"):
            kind = "a whole number" if whole else "a number"
            raise TraceError(f"{name}: must be {kind}, {least} or more, is {value!r}")
        if name == "sessions" and number > SESSIONS_MAX:
            raise TraceError(f"{name}: must be at most {SESSIONS_MAX}, is {value!r}")
        yield name, number
