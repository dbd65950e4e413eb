"""The scheduler: the earliest deadline first, owners share, nobody starves, and what is overtaken is given back."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine.scheduler import AHEAD, ONLY, RESERVED, RETRIES, Scheduler, held_back, urgency
from batchery.engine.work import LeasedShard
from batchery.store.agenda import Running
from batchery.store.shards import ShardRow

NOW = 1_000_000.0
HOUR = 3_600
DAY = 24 * HOUR
SIZE = 256


class Table:
    """The shards of running batches, as the database has them, for one worker or several.

    Attributes:
        left: by batch, requests in shards that nobody holds.
        running: the batches, by id.
        served: by batch, how many requests were read.
    """

    def __init__(self) -> None:
        self.left: Counter[str] = Counter()
        self.running: dict[str, Running] = {}
        self.served: Counter[str] = Counter()
        self._ids = itertools.count()

    def create(self, id: str, owner: str, requests: int, *, window: float = DAY, weight: float = 1.0) -> Running:
        self.left[id] = requests
        self.running[id] = Running(id, owner, weight, int(NOW + window), requests)
        return self.running[id]

    def agenda(self) -> list[Running]:
        alive = (batch for batch in self.running.values() if self.served[batch.id] < batch.left)
        return sorted(alive, key=lambda batch: batch.deadline)

    def lease(self, scheduler: Scheduler, target: int, now: float = NOW, held: Iterable[str] = ()) -> None:
        wanted = scheduler.wanted(target, now, size=SIZE, held_back=set(held))
        found = []
        for id, item in wanted.items():
            for _ in range(item.shards):
                if self.left[id]:
                    size = min(SIZE, self.left[id])
                    self.left[id] -= size
                    found.append(shard(next(self._ids), self.running[id], size))
        scheduler.leased(wanted, found)

    def step(self, scheduler: Scheduler, target: int = 512, now: float = NOW, piece: int = 128) -> str | None:
        """Make way, lease what is missing, read one piece and take it as done; the batch that it was of."""
        for held in scheduler.overtaken(now):
            held.returning = True
            scheduler.given_back(held, len(held.unread))
            self.left[held.batch_id] += len(held.unread)
            scheduler.remove(held)
        self.lease(scheduler, target, now)
        read = scheduler.next(now, 0.0)
        if read is None:
            return None
        taken = read.unread[-piece:]
        del read.unread[-piece:]
        self.served[read.batch_id] += len(taken)
        if not read.unread:
            scheduler.remove(read)
        return read.batch_id

    def of_owners(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for id, count in self.served.items():
            found[self.running[id].owner] += count
        return found


def shard(id: int, batch: Running, requests: int) -> LeasedShard:
    return LeasedShard(
        ShardRow(
            id=id,
            batch_id=batch.id,
            model="m",
            deadline=batch.deadline,
            requests=array("I", range(requests)).tobytes(),
            done=None,
            lease_owner="w",
            lease_until=1.0,
            epoch=1,
        )
    )


def test_urgency_falls_by_one_when_the_time_left_has_halved() -> None:
    assert urgency(int(NOW) + DAY, NOW) - urgency(int(NOW) + HOUR, NOW) == 5
    assert urgency(int(NOW) + 4096, NOW) == urgency(int(NOW) + 8191, NOW) == urgency(int(NOW) + 4095, NOW) + 1
    assert urgency(int(NOW) - 5, NOW) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 900), st.integers(1, 2 * DAY)), max_size=12))
def test_everything_runs_once_and_each_owner_s_earliest_deadline_first(
    batches: list[tuple[str, int, int]],
) -> None:
    table, scheduler = Table(), Scheduler()
    for i, (owner, requests, window) in enumerate(batches):
        table.create(f"b{i}", owner, requests, window=window)
    scheduler.update(table.agenda())
    order = []
    while (id := table.step(scheduler)) is not None:
        order.append(id)
    assert table.served == {f"b{i}": requests for i, (_, requests, _) in enumerate(batches)}
    assert len(scheduler) == 0
    for owner in "abc":
        mine = [table.running[id].deadline for id in dict.fromkeys(order) if table.running[id].owner == owner]
        assert mine == sorted(mine)


def test_hundreds_of_owners_get_their_shares() -> None:
    draw = random.Random(7)
    table, scheduler = Table(), Scheduler()
    weights = {f"owner{i}": draw.choice([1, 1, 2, 4]) for i in range(300)}
    for owner, weight in weights.items():
        for part in range(3):
            table.create(f"{owner}-{part}", owner, 40_000, window=DAY - draw.randrange(100), weight=weight)
    for turn in range(12_000):
        if turn % 100 == 0:
            scheduler.update(table.agenda())
        table.step(scheduler)
    served = table.of_owners()
    each = sum(served.values()) / sum(weights.values())
    for owner, weight in weights.items():
        assert served[owner] == pytest.approx(weight * each, abs=(weight + 2) * SIZE)


def test_an_hour_overtakes_a_day_at_once_and_the_day_does_not_starve() -> None:
    table, scheduler = Table(), Scheduler()
    for i in range(200):
        table.create(f"day{i}", f"owner{i}", 100_000)
    scheduler.update(table.agenda())
    for _ in range(1_000):
        table.step(scheduler)
    before = table.of_owners()
    table.create("hour", "urgent", 200_000, window=HOUR)
    scheduler.planned(table.running["hour"])
    assert table.step(scheduler) == "hour"
    for turn in range(2_000):
        if turn % 100 == 0:
            scheduler.update(table.agenda())
        table.step(scheduler)
    served = table.of_owners()
    assert served["urgent"] / (2_001 * 128) == pytest.approx(1 - RESERVED, abs=0.02)
    reserve = [served[f"owner{i}"] - before[f"owner{i}"] for i in range(200)]
    assert sum(reserve) / (2_001 * 128) == pytest.approx(RESERVED, abs=0.02)
    assert max(reserve) - min(reserve) <= 3 * SIZE


def test_owners_share_by_requests_however_many_their_shards_have() -> None:
    """What is charged for is known only once it is leased, and is then put right where it was charged."""
    scheduler, ids, served = Scheduler(), itertools.count(), Counter[str]()
    sizes = {"whole": 256, "pieces": 7}  # as where a batch asks for a thousand models
    batches = {owner: Running(owner, owner, 1.0, int(NOW + DAY), 1_000_000) for owner in sizes}
    scheduler.update(batches.values())
    for _ in range(500):
        wanted = scheduler.wanted(1_024, NOW, size=131)
        leased = [shard(next(ids), batches[id], sizes[id]) for id, item in wanted.items() for _ in range(item.shards)]
        scheduler.leased(wanted, leased)
        while (read := scheduler.next(NOW, 0.0)) is not None:
            served[read.batch_id] += len(read.unread)
            read.unread.clear()
            scheduler.remove(read)
    assert served["pieces"] == pytest.approx(served["whole"], rel=0.1)


def test_of_one_owner_the_hour_runs_before_anything_else_of_the_day() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("day", "me", 100_000)
    scheduler.update(table.agenda())
    for _ in range(5):
        table.step(scheduler)
    table.create("hour", "me", 5_000, window=HOUR)
    scheduler.planned(table.running["hour"])
    order = [table.step(scheduler) for _ in range(50)]
    assert order[:40] == ["hour"] * 40
    assert set(order[40:]) == {"day"}


def test_a_flood_of_urgent_batches_leaves_everybody_else_a_share() -> None:
    """Again and again somebody brings more within the hour than can be done; a day's batch still goes on steadily."""
    table, scheduler = Table(), Scheduler()
    table.create("day", "patient", 10_000)
    done = 0
    for turn in range(2_000):
        if turn % 40 == 0:
            table.create(f"hour{turn}", "hasty", 40_000, window=HOUR + turn)
            scheduler.update(table.agenda())
        table.step(scheduler)
        if turn % 200 == 199:  # of 25 600 requests a half of the reserve is the patient's, until it is done
            gained = table.served["day"] - done
            assert gained >= min(2_400, 10_000 - done)
            done = table.served["day"]
    assert done == 10_000


def test_after_the_urgent_nobody_is_made_to_pay_for_it() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("mine", "a", 100_000)
    table.create("theirs", "b", 100_000)
    table.create("hour", "a", 20_000, window=HOUR)
    scheduler.update(table.agenda())
    while table.served["hour"] < 20_000:
        table.step(scheduler)
    before = table.served.copy()
    for _ in range(400):
        table.step(scheduler)
    gained = [table.served[id] - before[id] for id in ("mine", "theirs")]
    assert gained[0] / sum(gained) == pytest.approx(0.5, abs=0.15)  # the reserve alone catches up


def test_what_is_leased_of_a_later_deadline_does_not_block() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("day", "a", 10_000)
    scheduler.update(table.agenda())
    table.lease(scheduler, 512)
    assert scheduler.unread() == 512
    table.create("hour", "b", 10_000, window=HOUR)
    scheduler.update(table.agenda())
    overtaken = scheduler.overtaken(NOW)
    assert [(held.batch_id, len(held.unread)) for held in overtaken] == [("day", SIZE)] * 2
    for held in overtaken:
        held.returning = True
        scheduler.given_back(held, len(held.unread))
    assert scheduler.unread() == 0
    assert scheduler.overtaken(NOW) == []
    table.lease(scheduler, 512)
    read = scheduler.next(NOW, 0.0)
    assert read is not None
    assert read.batch_id == "hour"
    assert len(scheduler) > 2  # they are held until nothing of them is in flight
    for held in overtaken:
        scheduler.remove(held)


def test_what_is_stopping_is_passed_over_and_what_could_not_be_read_waits() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("a", "me", SIZE, window=HOUR)
    table.create("b", "me", SIZE, window=HOUR + 1)
    scheduler.update(table.agenda())
    table.lease(scheduler, 512)
    first = scheduler.next(NOW, 0.0)
    assert first is not None
    assert first.batch_id == "a"
    first.unreadable_until = 5.0
    second = scheduler.next(NOW, 4.9)
    assert second is not None
    assert second.batch_id == "b"
    assert scheduler.next(NOW, 5.0) is first
    first.stopping = True
    assert scheduler.next(NOW, 5.0) is second
    assert scheduler.unread() == SIZE


def test_a_batch_is_not_asked_again_that_had_nothing_free() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("elsewhere", "a", 5_000)
    table.left["elsewhere"] = 0  # other workers hold it
    table.create("here", "b", 5_000)
    scheduler.update(table.agenda())
    table.lease(scheduler, 512)
    table.lease(scheduler, 512)
    assert {held.batch_id for held in scheduler} == {"here"}
    assert "elsewhere" not in scheduler.wanted(4_096, NOW, size=SIZE)
    scheduler.update(table.agenda())
    assert "elsewhere" in scheduler.wanted(8_192, NOW, size=SIZE)


def test_what_other_workers_are_for_is_in_nobody_s_way() -> None:
    table, scheduler = Table(), Scheduler()
    day = table.create("day", "a", 10_000)
    table.running["day"] = msgspec.structs.replace(day, model="m")
    scheduler.update(table.agenda())
    table.lease(scheduler, 512)
    hour = table.create("hour", "a", 10_000, window=HOUR)
    table.running["hour"] = msgspec.structs.replace(hour, model="y")
    scheduler.update(table.agenda())
    elsewhere = frozenset(["y"])
    assert scheduler.overtaken(NOW, elsewhere) == []  # it goes first, but not here
    assert list(scheduler.wanted(2_048, NOW, size=SIZE, full=elsewhere)) == ["day"]
    assert not scheduler.is_mixed(["day", "hour"])
    scheduler.update(table.agenda())
    assert scheduler.overtaken(NOW) != []  # once it may go here it does
    assert "hour" in scheduler.wanted(2_048, NOW, size=SIZE)


def test_a_batch_that_has_nothing_else_to_lease_is_asked_again_after_a_while() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("mixed", "a", 10_000)
    scheduler.update(table.agenda())
    elsewhere = frozenset(["y"])
    wanted = scheduler.wanted(512, NOW, size=SIZE, full=elsewhere)
    assert scheduler.is_mixed(wanted)
    scheduler.leased(wanted, [], elsewhere, NOW)
    scheduler.update(table.agenda())
    assert scheduler.overtaken(NOW, elsewhere) == []
    assert scheduler.wanted(512, NOW + ONLY - 1, size=SIZE, full=elsewhere | {"z"}) == {}
    assert "mixed" in scheduler.wanted(512, NOW + ONLY, size=SIZE, full=elsewhere), "others may have given some back"
    assert "mixed" in scheduler.wanted(512, NOW, size=SIZE, full=frozenset(["z"]))


def test_nothing_is_leased_after_its_window_or_beyond_what_is_wanted() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("over", "a", 5_000, window=-1)
    scheduler.update(table.agenda())
    assert scheduler.wanted(512, NOW, size=SIZE) == {}
    table.create("small", "a", 10)
    table.create("large", "b", 100_000)
    scheduler.update(table.agenda())
    assert {id: item.shards for id, item in scheduler.wanted(512, NOW, size=SIZE).items()} == {"small": 1, "large": 2}
    assert sum(item.shards for item in scheduler.wanted(10**9, NOW, size=SIZE).values()) == 16


# Retries of one batch do not hold back the others.


def test_few_retries_hold_nothing_back() -> None:
    assert held_back({}, 256, full=True) == set()
    assert held_back({"a": RETRIES}, 256, full=False) == set()  # four times what may be in flight is more


def test_who_has_most_of_the_retries_is_held_back() -> None:
    assert held_back({"sick": 1_100, "well": 3}, 64, full=False) == {"sick"}
    assert held_back({"sick": 900, "ill": 800, "well": 3}, 64, full=False) == {"sick", "ill"}
    assert held_back({"sick": 20, "well": 2}, 256, full=True) == {"sick"}


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(1, 3_000)), st.integers(1, 512), st.booleans()
)
def test_when_too_many_wait_somebody_is_held_back(waiting: dict[str, int], limit: int, full: bool) -> None:
    held = held_back(waiting, limit, full=full)
    assert held <= set(waiting)
    if sum(waiting.values()) >= max(RETRIES, 4 * limit) or (full and waiting):
        assert held
    else:
        assert not held


def test_a_batch_that_is_held_back_is_neither_leased_nor_read() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("sick", "a", 5_000, window=HOUR)
    table.create("well", "b", 5_000)
    scheduler.update(table.agenda())
    table.lease(scheduler, 512)
    first = scheduler.next(NOW, 0.0)
    assert first is not None
    assert first.batch_id == "sick"
    table.lease(scheduler, 512, held=["sick"])
    following = scheduler.next(NOW, 0.0, {"sick"})
    assert following is not None
    assert following.batch_id == "well"


def prefixed(scheduler: Scheduler, table: Table, groups: dict[str, list[int]]) -> list[tuple[str, int]]:
    """Read all that is leased, in pieces of one prefix of each shard; the batches and the prefixes in that order."""
    shards = {held.batch_id: held for held in scheduler}
    for id, held in shards.items():
        held.prefix = groups[id][0]
    order = []
    while (read := scheduler.next(NOW, 0.0)) is not None:
        order.append((read.batch_id, read.prefix))
        groups[read.batch_id].pop(0)
        if groups[read.batch_id]:
            read.prefix = groups[read.batch_id][0]
        else:
            read.unread.clear()
    return order


def test_batches_go_on_together_with_what_begins_alike() -> None:
    table, scheduler = Table(), Scheduler()
    for id in "abc":
        table.create(id, id, SIZE)
    scheduler.update(table.agenda())
    table.lease(scheduler, 3 * SIZE)
    order = prefixed(scheduler, table, {"a": [10, 20, 40], "b": [20, 30, 40], "c": [10, 30, 50]})
    assert [prefix for _, prefix in order] == [10, 10, 20, 20, 30, 30, 40, 40, 50]


def test_what_is_more_urgent_goes_first_whatever_it_begins_with() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("day", "a", SIZE)
    table.create("hour", "b", SIZE, window=HOUR)
    scheduler.update(table.agenda())
    table.lease(scheduler, 4 * SIZE)
    order = prefixed(scheduler, table, {"day": [10, 20], "hour": [20, 30]})
    assert order == [("hour", 20), ("hour", 30), ("day", 10), ("day", 20)]


def test_nobody_waits_long_for_the_sake_of_the_prefixes_of_others() -> None:
    table, scheduler = Table(), Scheduler()
    table.create("other", "a", SIZE)
    table.create("many", "b", 1_000 * SIZE)
    scheduler.update(table.agenda())
    read: list[str] = []
    while "other" not in read:
        table.lease(scheduler, 4 * SIZE)
        for held in scheduler:
            held.prefix = 7 if held.batch_id == "other" else 5
        scheduler._prefixes["m"] = 5  # whatever the order, the others would always be nearer
        following = scheduler.next(NOW, 0.0)
        assert following is not None
        read.append(following.batch_id)
        following.unread.clear()
        scheduler.remove(following)
        assert len(read) <= AHEAD + 1


def test_models_take_turns_whatever_their_prefixes() -> None:
    scheduler = Scheduler()
    table = Table()
    table.create("a", "a", SIZE)
    table.create("b", "b", SIZE)
    scheduler.update(table.agenda())
    table.lease(scheduler, 2 * SIZE)
    first, second = scheduler
    first.model, first.prefix = "x", 9
    second.model, second.prefix = "y", 1
    assert scheduler.next(NOW, 0.0) is first
