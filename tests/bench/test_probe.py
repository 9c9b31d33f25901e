"""The probe for foreign prompts: its statistics, what it finds in servers that leak, and nothing in one that does not."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import pytest

from bench.probe import BYSTANDER, Answer, Verdict, Who, compare, made_up, probe

ROUNDS = 60


def sample(seed: int, count: int, middle: float = 0.0) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(middle, 1.0) for _ in range(count)]


@pytest.mark.parametrize("middle", [-3.0, -1.0, 1.0, 5.0])
def test_a_shift_is_found_with_its_bounds(middle: float) -> None:
    found = compare(sample(1, 80, middle), sample(2, 80), 0.01)
    assert found.p < 0.001
    assert found.low_ms < found.shift_ms < found.high_ms
    assert found.low_ms < middle < found.high_ms
    assert found.low_ms * found.high_ms > 0


def test_equal_samples_are_called_different_as_rarely_as_was_asked() -> None:
    called = [compare(sample(2 * seed, 30), sample(2 * seed + 1, 30), 0.05) for seed in range(400)]
    assert 8 <= sum(found.p < 0.05 for found in called) <= 34  # 20 in the mean
    assert 8 <= sum(not found.low_ms < 0 < found.high_ms for found in called) <= 34


def test_the_rank_test_is_near_the_share_of_all_orders_that_are_as_far_apart() -> None:
    one, other = sample(1, 8, 1.0), sample(2, 6)
    values = [*one, *other]
    middle = len(one) * len(other) / 2

    def distance(places: tuple[int, ...]) -> float:
        rest = [values[place] for place in range(len(values)) if place not in places]
        return abs(sum(values[place] > value for place in places for value in rest) - middle)

    found = [distance(places) for places in combinations(range(len(values)), len(one))]
    exact = sum(one >= found[0] for one in found) / len(found)
    assert compare(one, other, 0.05).p == pytest.approx(exact, rel=0.2)
    assert compare([1.0] * 30, [1.0] * 30, 0.05).p == 1.0


@dataclass
class Server:
    """Answers as fast as what it knows lets it; `leaks` and `forgets` say what is wrong with it."""

    leaks: Callable[[Who, Who], bool] = lambda owner, asker: False
    forgets: bool = False
    blind: bool = False
    cached_told: bool = False
    chance: random.Random = field(default_factory=lambda: random.Random(5))
    known: dict[str, list[Who]] = field(default_factory=dict)

    def send(self, who: Who, prompt: str) -> Answer:
        owners = self.known.setdefault(prompt, [])
        own = who in owners
        hit = not self.blind and (own or any(self.leaks(owner, who) for owner in owners))
        if self.forgets and not own and owners:
            owners.clear()
        if who not in owners:
            owners.append(who)
        cached = 48 if own or (self.cached_told and len(owners) > 1) else 0
        return Answer((2.0 if hit else 5.0) + self.chance.gauss(0.0, 0.3), cached, 50)


def verdicts(server: Server) -> list[Verdict]:
    chance = random.Random(3)
    return probe(server.send, "none", lambda: made_up(chance, 20), ROUNDS, chance)


def test_a_server_that_keeps_its_secrets_holds() -> None:
    found = verdicts(Server())
    assert [(one.divided_by, one.rounds, one.wrong) for one in found] == [("tenants", ROUNDS, ()), ("salts", ROUNDS, ())]
    for one in found:
        assert one.hit.low_ms > 2.5
        assert one.leak.p > 0.01


@pytest.mark.parametrize(
    ("server", "tenants", "salts"),
    [
        (Server(leaks=lambda owner, asker: True), "told from an unknown one", "told from an unknown one"),
        (Server(leaks=lambda owner, asker: owner.key == asker.key), "", "told from an unknown one"),
        (Server(leaks=lambda owner, asker: owner.key != asker.key), "told from an unknown one", ""),
        (Server(forgets=True), "repetitions had no cached tokens", "repetitions had no cached tokens"),
        (Server(blind=True), "this probe would see nothing", "this probe would see nothing"),
        (Server(cached_told=True), "of the prober's prompts had cached tokens", "of the prober's prompts had cached tokens"),
    ],
)
def test_a_server_that_leaks_does_not_hold(server: Server, tenants: str, salts: str) -> None:
    for found, said in zip(verdicts(server), (tenants, salts), strict=True):
        assert any(said in wrong for wrong in found.wrong) if said else not found.wrong


def test_a_bystanders_prompts_must_survive_the_probes() -> None:
    server = Server()

    def send(who: Who, prompt: str) -> Answer:
        answer = server.send(who, prompt)
        if who != BYSTANDER and len(server.known) > 30:  # by then only few of the bystander's are left
            for owners in list(server.known.values())[:20]:
                owners.clear()
        return answer

    chance = random.Random(3)
    for one in probe(send, "none", lambda: made_up(chance, 20), ROUNDS, chance):
        assert "some of a bystander's blocks are gone" in one.wrong


def test_made_up_prompts_are_equally_long_and_share_nothing() -> None:
    chance = random.Random(3)
    one, other = made_up(chance, 30), made_up(chance, 30)
    assert len(one) == len(other)
    assert not {*one.split()} & {*other.split()}
