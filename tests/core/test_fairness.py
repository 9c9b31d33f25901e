"""Fair queueing between tenants: who is owed the next turn, and what nobody can save up."""

from random import Random

import pytest

from orchestrator.core.fairness import CREDIT_TOKENS, OUTPUT_TOKENS_GUESSED, Accounts, FairQueue, output_work
from orchestrator.core.types import TenantId

A, B, C = TenantId("a"), TenantId("b"), TenantId("c")


def serve(accounts: Accounts, tenant: TenantId, tokens: int, share: float = 1.0) -> None:
    accounts.reach(accounts.level(tenant))
    accounts.charge(tenant, tokens, share)


def test_work_counts_by_share() -> None:
    accounts = Accounts()
    accounts.enter(A)
    accounts.enter(B)
    serve(accounts, A, 600, share=1.0)
    serve(accounts, B, 600, share=3.0)
    assert (accounts.level(A), accounts.level(B), accounts.contested) == (600.0, 200.0, True)


def test_who_comes_late_begins_where_the_others_are_but_for_its_credit() -> None:
    accounts = Accounts()
    accounts.enter(A)
    serve(accounts, A, 100_000)
    serve(accounts, A, 1)
    accounts.enter(B)
    assert accounts.level(B) == 100_000 - CREDIT_TOKENS


def test_what_a_tenant_got_is_remembered_while_it_is_away_and_others_are_served() -> None:
    accounts = Accounts()
    accounts.enter(A)
    accounts.enter(B)
    serve(accounts, B, 5_000)
    accounts.leave(B)
    accounts.enter(B)
    assert accounts.level(B) == 5_000  # leaving and coming back wins nothing


def test_all_accounts_are_closed_when_nobody_competes() -> None:
    accounts = Accounts()
    accounts.enter(A)
    accounts.enter(A)
    serve(accounts, A, 100_000)
    accounts.leave(A)
    accounts.validate({A: 1})
    accounts.leave(A)
    accounts.validate({})
    accounts.enter(B)
    accounts.enter(A)
    assert (accounts.level(A), accounts.level(B)) == (0.0, 0.0)


def test_a_checker_notices_what_is_not_counted() -> None:
    accounts = Accounts()
    accounts.enter(A)
    with pytest.raises(AssertionError, match="compete, counted are"):
        accounts.validate({A: 2})


def test_output_is_charged_as_it_is_guessed() -> None:
    assert (output_work(7), output_work(100_000)) == (7, OUTPUT_TOKENS_GUESSED)


def test_a_queue_goes_by_level_then_by_rank() -> None:
    accounts = Accounts()
    queue: FairQueue[str] = FairQueue(accounts)
    assert (queue.first(), queue.last(A), len(queue)) == (None, None, 0)
    for tenant, rank, item in ((A, 2, "a2"), (A, 1, "a1"), (B, 0, "b0")):
        accounts.enter(tenant)
        queue.push(tenant, rank, item)
    assert (queue.first(), queue.last(A), queue.waiting(A), queue.tenants) == ("b0", "a2", 2, (A, B))
    serve(accounts, B, 1)
    assert queue.first() == "a1"
    assert (queue.first([A]), queue.first([A, B])) == ("b0", None)  # passed over
    queue.remove(A, 1)
    assert (queue.first(), list(queue), len(queue)) == ("a2", ["a2", "b0"], 2)
    queue.validate()
    with pytest.raises(AssertionError, match="a: rank 2 waits, not 1"):
        queue.remove(A, 1)


@pytest.mark.parametrize("seed", range(5))
def test_in_the_long_run_everybody_that_always_waits_gets_its_share(seed: int) -> None:
    random = Random(seed)
    shares = {A: 1.0, B: 2.0, C: 5.0}
    accounts = Accounts()
    queue: FairQueue[TenantId] = FairQueue(accounts)
    got, ranks = dict.fromkeys(shares, 0), dict.fromkeys(shares, 0)
    for tenant in shares:
        accounts.enter(tenant)
        queue.push(tenant, 0, tenant)
    for rank in range(1, 5_000):
        tenant = queue.first()
        assert tenant is not None
        tokens = random.randrange(1, 5_000)
        serve(accounts, tenant, tokens, shares[tenant])
        got[tenant] += tokens
        queue.remove(tenant, ranks[tenant])
        ranks[tenant] = rank
        queue.push(tenant, rank, tenant)
    levels = [got[tenant] / share for tenant, share in shares.items()]
    assert max(levels) - min(levels) <= 5_000  # nobody is ahead by more than one piece of work
