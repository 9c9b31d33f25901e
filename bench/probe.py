"""Whether time tells anything about somebody else's prompt: a known foreign prompt against an unknown one, by ranks.

    python -m bench.probe [--rounds 300] [--words 1000] [--seed N] [--json FILE]

Runs `weft serve` with two tenants, once with an engine whose prompts cost time (KV blocks, and all before them) and once with one
at no cost (tokenising and the cache of prompts alone). In each round an owner sends a new long prompt, and again; then, in an
order drawn by chance, a prober sends that prompt and one of the same length that nobody has sent; then the owner sends its own
once more. Prober and owner are two tenants, then two cache salts of one tenant. It holds if the prober's two times cannot be told
apart while the owner's can be told from a new prompt's, the probes make nothing of the owner's slower or computed again, and what
a third tenant sent before everything is still there at the end. Exit code 1 says that something of it does not hold.
"""

import argparse
import http.client
import json
import math
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.model import make_tiny_model
from bench.servers import weft_server

MODEL = "tiny"
CLUSTER = """
[gateway]
prompts_cached_max = 16384
[models.tiny]
[[tenants]]
name = "owner"
keys = ["sk-owner"]
[[tenants]]
name = "prober"
keys = ["sk-prober"]
[[tenants]]
name = "bystander"
keys = ["sk-bystander"]
[[pools]]
name = "all"
model = "tiny"
kind = "aggregated"
engine = {{ name = "profiled", block_tokens = 16, blocks = 1048576 }}
scheduler = {{ step_tokens_max = 16384 }}
[pools.profile]
prefill_token_s = {prefill_token_s}
"""
#: Seconds a prompt token takes, by what then tells in a time.
ENGINES = {"blocks": 5e-6, "prompts": 0.0}
#: Chance of calling equal times different anywhere in one run.
ALPHA = 0.01
#: A difference this much smaller than what a hit saves is none; the bounds on it must be as near.
SHARE_MAX = 0.1
WARM_ROUNDS, STANDING, WORD_CHARS = 10, 20, 4
ANSWER_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Who:
    """Under which name a prompt is sent."""

    key: str
    salt: str = ""


BYSTANDER = Who("sk-bystander")
#: (owner, prober) by what divides them.
SIDES = {"tenants": (Who("sk-owner"), Who("sk-prober")), "salts": (Who("sk-owner", "one"), Who("sk-owner", "two"))}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt took, and how many of its tokens were cached, as the answer says."""

    ms: float
    cached_tokens: int
    prompt_tokens: int


#: Sends a prompt under a name.
Send = Callable[[Who, str], Answer]


@dataclass(frozen=True, slots=True)
class Difference:
    """How much longer one sample takes than another."""

    #: Chance of ranks so far apart if both were drawn alike (Mann-Whitney U, two-sided).
    p: float
    #: Median of all differences between the two, ms, and its bounds at 1 - ALPHA.
    shift_ms: float
    low_ms: float
    high_ms: float


@dataclass(slots=True)
class Times:
    """What one side's rounds took."""

    new: list[Answer] = field(default_factory=list[Answer])
    again: list[Answer] = field(default_factory=list[Answer])
    foreign: list[Answer] = field(default_factory=list[Answer])
    unknown: list[Answer] = field(default_factory=list[Answer])
    probed: list[Answer] = field(default_factory=list[Answer])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one side's times say."""

    engine: str
    divided_by: str
    rounds: int
    new_ms: float
    again_ms: float
    foreign_ms: float
    unknown_ms: float
    #: A foreign prompt against an unknown one, a new one against its repetition, that against the repetition after the probes.
    leak: Difference
    hit: Difference
    after_probes: Difference
    #: What does not hold.
    wrong: tuple[str, ...]


def compare(one: Sequence[float], other: Sequence[float], alpha: float) -> Difference:
    """Return how much longer `one` takes than `other`. Normal approximations, ties counted: for 20 samples and more."""
    first, second = np.asarray(one), np.asarray(other)
    pairs = np.sort((first[:, None] - second[None, :]).ravel())
    count = len(first) * len(second)
    u = float((pairs > 0).sum() + 0.5 * (pairs == 0).sum())
    total = len(first) + len(second)
    _, ties = np.unique(np.concatenate([first, second]), return_counts=True)
    spread = math.sqrt(count / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1))))
    p = math.erfc(max(0.0, abs(u - count / 2) - 0.5) / spread / math.sqrt(2)) if spread else 1.0
    z = statistics.NormalDist().inv_cdf(1 - alpha / 2)
    outside = max(0, math.floor(count / 2 - z * math.sqrt(count * (total + 1) / 12)))
    return Difference(p, float(np.median(pairs)), float(pairs[outside]), float(pairs[count - 1 - outside]))


def run_rounds(send: Send, owner: Who, prober: Who, prompts: Callable[[], str], rounds: int, chance: random.Random) -> Times:
    """Play rounds; the first few are for warming up and are left out."""
    times = Times()
    for number in range(-WARM_ROUNDS, rounds):
        prompt, unknown = prompts(), prompts()
        new, again = send(owner, prompt), send(owner, prompt)
        order = [(times.foreign, prompt), (times.unknown, unknown)]
        chance.shuffle(order)
        probes = [(kept, send(prober, text)) for kept, text in order]
        probed = send(owner, prompt)
        if number >= 0:
            for kept, answer in ((times.new, new), (times.again, again), (times.probed, probed), *probes):
                kept.append(answer)
    return times


def judge(engine: str, divided_by: str, times: Times, alpha: float) -> Verdict:
    """Say what times and counts of cached tokens tell."""
    sample = {name: [answer.ms for answer in getattr(times, name)] for name in ("new", "again", "foreign", "unknown", "probed")}
    leak, hit = compare(sample["foreign"], sample["unknown"], alpha), compare(sample["new"], sample["again"], alpha)
    after = compare(sample["probed"], sample["again"], alpha)
    near = SHARE_MAX * hit.shift_ms
    wrong: list[str] = []
    if not (hit.p < alpha and hit.low_ms > 0):
        wrong.append("the owner's own hit cannot be seen: this probe would see nothing")
    elif max(-leak.low_ms, leak.high_ms) > near:
        wrong.append(f"a foreign prompt may differ by {max(-leak.low_ms, leak.high_ms):.3f} ms, over {near:.3f}; or more rounds")
    if leak.p < alpha:
        wrong.append(f"a foreign prompt is told from an unknown one (p {leak.p:.2g})")
    if hit.p < alpha and after.low_ms > near:
        wrong.append(f"the owner's prompt takes {after.shift_ms:.3f} ms longer after the probes")
    foreign = [answer.cached_tokens for answer in (*times.foreign, *times.unknown) if answer.cached_tokens]
    if foreign:
        wrong.append(f"{len(foreign)} of the prober's prompts had cached tokens, up to {max(foreign)}")
    lost = [answer for answer in (*times.again, *times.probed) if not answer.cached_tokens]
    if lost:
        wrong.append(f"{len(lost)} of the owner's repetitions had no cached tokens")
    medians = {f"{name}_ms": statistics.median(values) for name, values in sample.items() if name != "probed"}
    return Verdict(engine, divided_by, len(times.new), **medians, leak=leak, hit=hit, after_probes=after, wrong=tuple(wrong))


def probe(send: Send, engine: str, prompts: Callable[[], str], rounds: int, chance: random.Random) -> list[Verdict]:
    """Play and judge all sides, between a bystander's prompts and their repetition."""
    alpha = ALPHA / (len(SIDES) * len(ENGINES))
    standing = [prompts() for _ in range(STANDING)]
    for prompt in standing:
        send(BYSTANDER, prompt)
    before = [send(BYSTANDER, prompt) for prompt in standing]
    verdicts = [
        judge(engine, divided_by, run_rounds(send, owner, prober, prompts, rounds, chance), alpha)
        for divided_by, (owner, prober) in SIDES.items()
    ]
    after = [send(BYSTANDER, prompt) for prompt in standing]
    slower = compare([answer.ms for answer in after], [answer.ms for answer in before], alpha)
    wrong: list[str] = []
    if [answer.cached_tokens for answer in after] != [answer.cached_tokens for answer in before]:
        wrong.append("some of a bystander's blocks are gone")
    if slower.low_ms > SHARE_MAX * max(verdict.hit.shift_ms for verdict in verdicts):
        wrong.append(f"a bystander's prompts take {slower.shift_ms:.3f} ms longer after all probes")
    return [_with(verdict, wrong) for verdict in verdicts]


def _with(verdict: Verdict, wrong: Sequence[str]) -> Verdict:
    fields = {name: getattr(verdict, name) for name in Verdict.__dataclass_fields__}
    return Verdict(**{**fields, "wrong": (*verdict.wrong, *wrong)})


def made_up(chance: random.Random, words_count: int) -> str:
    """Return words that nobody has used, as many letters every time: no cache of words can know them either."""
    letters = chance.choices(string.ascii_lowercase, k=WORD_CHARS * words_count)
    return " ".join("".join(letters[start : start + WORD_CHARS]) for start in range(0, len(letters), WORD_CHARS))


class Client:
    """One connection to a gateway, kept open."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        assert place.hostname is not None, f"{url} names no host"
        self._connection = http.client.HTTPConnection(place.hostname, place.port, timeout=ANSWER_S_MAX)

    def send(self, who: Who, prompt: str) -> Answer:
        """Send a prompt and read the answer, one token. Raises `RuntimeError` for any other answer."""
        body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
        body |= {"cache_salt": who.salt} if who.salt else {}
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {who.key}"}
        started = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", content, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        ms = (time.perf_counter() - started) * 1e3
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {text[:300]!r}")
        usage = json.loads(text)["usage"]
        return Answer(ms, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def measure(rounds: int, words_count: int, seed: int) -> list[Verdict]:
    """Probe both engines."""
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder:
        model, _ = make_tiny_model(Path(folder) / MODEL)
        for engine, prefill_token_s in ENGINES.items():
            chance = random.Random(seed)

            def prompts(chance: random.Random = chance) -> str:
                return made_up(chance, words_count)

            with weft_server(CLUSTER.format(prefill_token_s=prefill_token_s), model) as server:
                client = Client(server.url)
                verdicts += probe(client.send, engine, prompts, rounds, chance)
                client.close()
    return verdicts


def table(verdicts: Sequence[Verdict]) -> Table:
    """Return what came of it, a line a side."""
    shown = Table(title=f"median ms of a prompt; bounds at {1 - ALPHA:.0%} over all lines together")
    columns = (
        "engine",
        "divided by",
        "rounds",
        "new",
        "repeated",
        "hit",
        "foreign",
        "unknown",
        "difference",
        "p",
        "after probes",
    )
    for column in (*columns, "holds"):
        shown.add_column(column, justify="right")
    for one in verdicts:
        times = (one.new_ms, one.again_ms, one.hit.shift_ms, one.foreign_ms, one.unknown_ms)
        shown.add_row(
            one.engine,
            one.divided_by,
            str(one.rounds),
            *(f"{value:.2f}" for value in times),
            _bounds(one.leak),
            f"{one.leak.p:.3f}",
            _bounds(one.after_probes),
            "NO" if one.wrong else "yes",
        )
    return shown


def _bounds(one: Difference) -> str:
    return f"{one.shift_ms:+.3f} [{one.low_ms:+.3f}, {one.high_ms:+.3f}]"


def main() -> int:
    """Probe, print a table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.probe", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="rounds of each line (%(default)s)")
    parser.add_argument("--words", type=int, default=1000, help="words of a prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    verdicts = measure(options.rounds, options.words, options.seed)
    Console(width=150).print(table(verdicts))
    for verdict in verdicts:
        for wrong in verdict.wrong:
            print(f"{verdict.engine}, {verdict.divided_by}: {wrong}")
    if options.json:
        options.json.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    return 1 if any(verdict.wrong for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
