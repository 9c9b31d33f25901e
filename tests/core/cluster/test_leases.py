"""The rules of leases, by literals: what is granted, counted, given back, believed and cut."""

from dataclasses import replace

import pytest

from orchestrator.core.cluster.leases import ENDED_MAX, SAVED_S, TTL_S, Grant, Held, Leases, Refused, Wanted, leased_blocks
from orchestrator.core.config import LeasesConfig, TenantConfig
from orchestrator.core.hints import Reason
from orchestrator.core.types import Lease, LeaseId, ModelName, TenantId, Tier
from tests.builders import prompt_hashes

BLOCK_BYTES = 64
TENANTS = (TenantConfig("t"), TenantConfig("u"))


def leases_of(
    blocks: int = 10, tenants: tuple[TenantConfig, ...] = TENANTS, config: LeasesConfig | None = None, gateways: int = 1
) -> Leases:
    """Return leases over an hbm of which they may have so many blocks."""
    leases = Leases(config or LeasesConfig(), tenants, gateways)
    leases.set_capacity(Tier.HBM, blocks * BLOCK_BYTES)
    return leases


def wanted(prompt: str = "abc", name: str = "l", tenant: str = "t", tier: Tier = Tier.HBM, ttl_s: float = 10.0) -> Wanted:
    return Wanted(LeaseId(name), TenantId(tenant), ModelName("m"), prompt_hashes(prompt), BLOCK_BYTES, tier, ttl_s)


def place(leases: Leases, now: float = 0.0, **fields: str | float | Tier) -> Held:
    """Place what must be granted."""
    asked = wanted(**fields)  # type: ignore[arg-type]
    granted = leases.grant(asked, now)
    assert isinstance(granted, Grant), granted
    held = leases.place(asked, granted, now)
    leases.validate()
    return held


def test_two_tenants_share_what_may_be_leased_and_a_longer_one_is_clipped() -> None:
    leases = leases_of()
    assert leases.quota_bytes(TenantId("t"), Tier.HBM) == 5 * BLOCK_BYTES
    assert leases.grant(wanted("abcde"), 0.0) == Grant(5, Tier.HBM, 10.0, 5 * BLOCK_BYTES)
    assert leases.grant(wanted("abcdefg"), 0.0) == Grant(5, Tier.HBM, 10.0, 5 * BLOCK_BYTES, (Reason.QUOTA_BYTES,))
    place(leases, prompt="abcde")
    # Nothing is left for this tenant; the other has its own part.
    refused = leases.grant(wanted("xy", "l2"), 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason is Reason.QUOTA_BYTES
    assert leases.grant(wanted("xy", "l3", "u"), 0.0) == Grant(2, Tier.HBM, 10.0, 2 * BLOCK_BYTES)


def test_bytes_times_seconds_are_counted_as_leases_come_change_and_go() -> None:
    leases = leases_of()
    held = place(leases, now=10.0, prompt="abc", ttl_s=100.0)
    place(leases, now=20.0, name="other", tenant="u", ttl_s=100.0)
    leases.set_capacity(Tier.CPU, 10 * BLOCK_BYTES)
    lowered = leases.lower(held, Tier.CPU, 30.0)
    hbm, cpu, others = (TenantId("t"), Tier.HBM), (TenantId("t"), Tier.CPU), (TenantId("u"), Tier.HBM)
    size_bytes = 3 * BLOCK_BYTES
    assert leases.byte_seconds(40.0) == {hbm: 20 * size_bytes, cpu: 10 * size_bytes, others: 20 * size_bytes}
    leases.end(lowered, 50.0)
    assert leases.byte_seconds(60.0) == {hbm: 20 * size_bytes, cpu: 20 * size_bytes, others: 40 * size_bytes}


def test_a_tenant_may_be_given_a_quota_of_its_own_but_never_more_than_there_is_for_all() -> None:
    tenants = (TenantConfig("t", pinned_bytes_max={"hbm": 100 * BLOCK_BYTES}), TenantConfig("u"))
    leases = leases_of(tenants=tenants)
    assert leases.quota_bytes(TenantId("t"), Tier.HBM) == 10 * BLOCK_BYTES
    place(leases, prompt="abcdefgh")
    assert leases.bytes_left(TenantId("u"), Tier.HBM) == 2 * BLOCK_BYTES
    none = (TenantConfig("t", pinned_bytes_max={"hbm": 0}),)
    assert isinstance(leases_of(tenants=none).grant(wanted(), 0.0), Refused)


def test_a_lower_tier_with_room_for_all_is_better_than_a_part() -> None:
    leases = leases_of()
    leases.set_capacity(Tier.CPU, 100 * BLOCK_BYTES)
    granted = leases.grant(wanted("abcdefg"), 0.0)
    assert granted == Grant(7, Tier.CPU, 10.0, 7 * BLOCK_BYTES, (Reason.LOWER_TIER,))


def test_a_lease_that_is_renewed_makes_room_for_itself() -> None:
    leases = leases_of()
    held = place(leases, prompt="abcde")
    renewed = place(leases, 5.0, prompt="abcd")
    assert renewed.expires_at == 15.0
    assert renewed.lease.revision == held.lease.revision + 1
    assert leases.used_bytes == {(TenantId("t"), Tier.HBM): 4 * BLOCK_BYTES}


def test_times_have_bounds() -> None:
    leases = leases_of(config=LeasesConfig(ttl_s_max=100.0))
    assert leases.grant(wanted(ttl_s=0.0), 0.0) == Grant(3, Tier.HBM, 100.0, 3 * BLOCK_BYTES, (Reason.TTL_MAX,))
    refused = leases.grant(wanted(ttl_s=0.5), 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason is Reason.TTL_MIN
    granted = leases_of().grant(wanted(ttl_s=0.0), 0.0)
    assert isinstance(granted, Grant)
    assert granted.ttl_s == TTL_S


def test_a_tenant_has_so_many_leases() -> None:
    leases = leases_of(config=LeasesConfig(leases_max=2))
    place(leases, name="1", prompt="a")
    place(leases, name="2", prompt="a")
    refused = leases.grant(wanted("a", "3"), 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason is Reason.TOO_MANY_LEASES
    # One of them may be renewed.
    assert isinstance(leases.grant(wanted("a", "2"), 0.0), Grant)


def test_byte_seconds_are_paid_when_a_lease_is_placed_and_come_back_when_it_ends_early() -> None:
    rate = BLOCK_BYTES / 360  # saved up: ten seconds of one block
    leases = leases_of(tenants=(TenantConfig("t", pinned_byte_s_per_s=rate),))
    assert leases.byte_s_left(TenantId("t"), 0.0) == pytest.approx(rate * SAVED_S)
    held = place(leases, prompt="a", ttl_s=6.0)
    granted = leases.grant(wanted("a", "2", ttl_s=6.0), 0.0)
    assert isinstance(granted, Grant)
    assert granted.clipped == (Reason.QUOTA_BYTE_SECONDS,)
    assert granted.ttl_s == pytest.approx(4.0)
    # Five blocks for a second are more than the four block-seconds that are left.
    refused = leases.grant(wanted("abcde", "2", ttl_s=6.0), 0.0)
    assert isinstance(refused, Refused)
    assert refused.reason is Reason.QUOTA_BYTE_SECONDS
    leases.end(held, 0.0)
    assert leases.byte_s_left(TenantId("t"), 0.0) == pytest.approx(rate * SAVED_S)


def test_another_tenant_cannot_name_a_lease() -> None:
    leases = leases_of()
    held = place(leases)
    assert leases.get(held.lease.id, TenantId("t")) is held
    assert leases.get(held.lease.id, TenantId("u")) is None
    assert leases.of(TenantId("u")) == []


def test_a_lease_expires_at_its_time_and_not_before() -> None:
    leases = leases_of()
    held = place(leases)
    assert leases.expire(held.lease.id, 9.9) is None
    assert leases.expire(held.lease.id, 10.0) is held
    assert not len(leases)
    leases.validate()


def told_lease(revision: int, prompt: str = "ab", name: str = "far") -> Lease:
    hashes = prompt_hashes(prompt)
    return Lease(
        LeaseId(name), TenantId("t"), ModelName("m"), hashes, Tier.HBM, 10.0, len(hashes) * BLOCK_BYTES, revision=revision
    )


def test_of_what_is_told_the_highest_revision_counts_and_an_end_is_final() -> None:
    leases = leases_of()
    assert leases.learn(told_lease(2), 0.0) is not None
    assert leases.learn(told_lease(1, "abc"), 0.0) is None
    assert leases.learn(told_lease(3, "abc"), 0.0) is not None
    assert leases.learn_end(LeaseId("far"), 2, 0.0) is None  # behind
    assert leases.learn_end(LeaseId("far"), 3, 0.0) is not None
    assert leases.learn(told_lease(3), 0.0) is None  # from somebody who has not heard of the end
    assert leases.learn(told_lease(4), 0.0) is not None  # placed anew since
    leases.validate()


def test_ends_are_remembered_for_as_long_as_a_lease_could_come_back_and_at_most_so_many() -> None:
    leases = leases_of()
    leases.end(place(leases, name="first"), 0.0)
    assert leases.ended_revision(LeaseId("first")) == 0
    leases.end(place(leases, 11.0, name="second"), 11.0)
    assert leases.ended_revision(LeaseId("first")) == -1  # it would have expired by now
    for number in range(ENDED_MAX + 1):
        leases.learn_end(LeaseId(str(number)), 0, 12.0)
    assert leases.ended_revision(LeaseId("second")) == -1
    assert leases.ended_revision(LeaseId("0")) == -1
    assert leases.ended_revision(LeaseId("1")) == 0


def test_when_memory_goes_leases_sink_before_they_end_the_one_that_ends_soonest_first() -> None:
    leases = leases_of(tenants=())
    soon = place(leases, name="soon", prompt="abcd", ttl_s=5.0)
    late = place(leases, name="late", prompt="xyz", ttl_s=50.0)
    leases.set_capacity(Tier.HBM, 3 * BLOCK_BYTES)
    assert leases.exceeded == (Tier.HBM,)
    leases.set_capacity(Tier.CPU, 4 * BLOCK_BYTES)
    ((former, lowered),) = leases.fit(1.0)
    assert former is soon
    assert lowered is not None
    assert (lowered.lease.tier, lowered.expires_at, lowered.lease.revision) == (Tier.CPU, 5.0, 1)
    leases.set_capacity(Tier.HBM, 0)
    assert leases.fit(1.0) == [(late, None)]  # cpu has no room left
    leases.validate()


def test_a_holder_that_joins_is_told_what_is_left_of_its_models_leases() -> None:
    leases = leases_of()
    held = place(leases)
    assert leases.told(ModelName("m"), 4.0) == [replace(held.lease, ttl_s=6.0)]
    assert leases.told(ModelName("other"), 4.0) == []


def test_a_chain_is_covered_as_far_as_it_goes_with_the_lease() -> None:
    leases = leases_of()
    held = [place(leases, prompt="abc"), place(leases, name="2", prompt="ab")]
    assert leased_blocks(held, prompt_hashes("abcd")) == 3
    assert leased_blocks(held, prompt_hashes("abx")) == 2
    assert leased_blocks(held, prompt_hashes("x")) == 0
