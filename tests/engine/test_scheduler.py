"""The scheduler: the earliest deadline first, and as many leases as there is work for."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine.scheduler import Scheduler, shards_wanted
from batchery.engine.work import LeasedShard
from batchery.store.shards import ShardRow

NOW = 1000.0


def leased(id: int, deadline: int, requests: int = 2, done: bytes | None = None) -> LeasedShard:
    return LeasedShard(
        ShardRow(
            id=id,
            batch_id=f"{id:032}",
            model="m",
            deadline=deadline,
            requests=array("I", range(requests)).tobytes(),
            done=done,
            lease_owner="w",
            lease_until=1.0,
            epoch=1,
        )
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=20))
def test_the_earliest_deadline_is_read_first(given: list[tuple[int, int]]) -> None:
    scheduler = Scheduler()
    for id, (deadline, requests) in enumerate(given):
        scheduler.add(leased(id, deadline, requests))
    assert scheduler.unread() == sum(requests for _, requests in given)
    order = []
    while (shard := scheduler.next(NOW)) is not None:
        order.append((shard.deadline, shard.id))
        shard.unread.pop()
    expected = sorted((deadline, id) for id, (deadline, _) in enumerate(given))
    assert list(dict.fromkeys(order)) == expected
    assert scheduler.unread() == 0
    assert len(scheduler) == len(given)  # a shard stays until its last result is recorded


def test_an_earlier_deadline_overtakes_a_shard_that_is_half_read() -> None:
    scheduler = Scheduler()
    late, early = leased(1, 100), leased(2, 50)
    scheduler.add(late)
    late.unread.pop()
    assert scheduler.next(NOW) is late
    scheduler.add(early)
    assert scheduler.next(NOW) is early


def test_what_is_stopping_is_passed_over() -> None:
    scheduler = Scheduler()
    first, second = leased(1, 10), leased(2, 20)
    scheduler.add(first)
    scheduler.add(second)
    first.stopping = True
    assert scheduler.next(NOW) is second
    scheduler.remove(second)
    assert scheduler.next(NOW) is None
    assert list(scheduler) == [first]


def test_what_could_not_be_read_lets_others_go_first_for_a_while() -> None:
    scheduler = Scheduler()
    damaged, whole = leased(1, 10), leased(2, 20)
    scheduler.add(damaged)
    scheduler.add(whole)
    damaged.unreadable_until = NOW + 5
    assert scheduler.next(NOW) is whole
    assert scheduler.next(NOW + 5) is damaged


def test_the_latest_deadline_of_what_is_unread() -> None:
    scheduler = Scheduler()
    assert scheduler.last_deadline() is None
    late, early = leased(1, 100), leased(2, 50)
    scheduler.add(late)
    scheduler.add(early)
    assert scheduler.last_deadline() == 100
    late.unread.clear()
    assert scheduler.last_deadline() == 50


def test_of_a_shard_that_was_begun_only_the_rest_is_unread() -> None:
    shard = leased(1, 10, requests=10, done=bytes([0b11111110, 0b01]))
    assert shard.unread == [(9, 9), (0, 0)]  # from its end on
    shard.mark(9)
    assert shard.bits == bytes([0b11111110, 0b11])


@pytest.mark.parametrize(
    ("unread", "target", "size", "wanted"),
    [
        (0, 512, 256, 2),
        (511, 512, 256, 1),
        (512, 512, 256, 0),
        (900, 512, 256, 0),
        (0, 512, 1, 16),  # never very many at once
        (0, 512, 0.0, 16),
        (0, 2, 256, 1),
    ],
)
def test_how_many_shards_are_wanted(unread: int, target: int, size: float, wanted: int) -> None:
    assert shards_wanted(unread, target, size) == wanted
