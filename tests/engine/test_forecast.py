"""When batches are expected to be done: runs in made-up time, each look held against the end."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine import forecast
from batchery.engine.forecast import Pace, Progress, ends, groups

GOOD = 0.15
"""Of the length of a run, by which an estimate may be off once the first tenth is over."""

Latency = Callable[[random.Random], float]

CONSTANT: Latency = lambda draw: 1.0  # noqa: E731
LOG_NORMAL: Latency = lambda draw: draw.lognormvariate(0.0, 0.6)  # noqa: E731


@dataclass
class Run:
    """A batch in made-up time.

    Attributes:
        comes: when it is created.
        estimates: (when, for when) of each look.
        end: when its last result came.
    """

    total: int
    owner: str = "a"
    deadline: int = 86_400
    comes: float = 0.0
    latency: Latency = CONSTANT
    done: int = 0
    sent: int = 0
    estimates: list[tuple[float, float]] = field(default_factory=list)
    end: float = 0.0

    def worst(self, start: float) -> float:
        """The largest error of a look from `start` on, of the length of the run."""
        looks = [(when, wanted) for when, wanted in self.estimates if when >= start]
        assert len(looks) > 10
        return max(abs(wanted - self.end) for _, wanted in looks) / (self.end - self.comes)

    @property
    def tenth(self) -> float:
        """When the first tenth of it is over."""
        return self.comes + (self.end - self.comes) / 10


def play(
    runs: list[Run], *, slots: int = 64, look: float = 0.5, capacity: Callable[[float], int] | None = None
) -> None:
    """Run batches on so many slots, as the scheduler does: an owner's earliest deadline first, owners in turn."""
    draw = random.Random(7)
    pace = Pace()
    order = itertools.count()
    events: list[tuple[float, int, Run | None]] = [(0.0, next(order), None)]
    busy = 0
    turns = {run.owner: 0 for run in runs}
    while any(run.end == 0 for run in runs):
        now, _, run = heapq.heappop(events)
        if run is None:
            _look(pace, runs, now)
            heapq.heappush(events, (now + look, next(order), None))
        else:
            busy -= 1
            run.done += 1
            if run.done == run.total:
                run.end = now
        while busy < (slots if capacity is None else capacity(now)):
            waiting = [one for one in runs if one.comes <= now and one.sent < one.total]
            if not waiting:
                break
            owner = min((one.owner for one in waiting), key=lambda name: turns[name])
            taken = min((one for one in waiting if one.owner == owner), key=lambda one: one.deadline)
            turns[owner] = next(order)
            taken.sent += 1
            busy += 1
            heapq.heappush(events, (now + taken.latency(draw), next(order), taken))


def _look(pace: Pace, runs: list[Run], now: float) -> None:
    live = sorted((run for run in runs if run.comes <= now and run.end == 0), key=lambda run: run.deadline)
    progress = [
        Progress(
            id=str(runs.index(run)),
            owner=run.owner,
            weight=1.0,
            deadline=run.deadline,
            left=run.total - run.done,
            done=run.done,
            since=run.comes,
        )
        for run in live
    ]
    begins = pace.begins(progress)
    pace.observe(
        now, progress, 0 if begins is not None else {id: runs[int(id)].total for id in pace.vanished(progress)}
    )
    if (rate := pace.rate(now)) is not None:
        found = ends(progress, rate, now)
        for run in live:
            run.estimates.append((now, now + found[str(runs.index(run))]))


@pytest.mark.parametrize("latency", [CONSTANT, LOG_NORMAL])
@pytest.mark.parametrize("total", [2_000, 20_000])
def test_one_batch(latency: Latency, total: int) -> None:
    run = Run(total, latency=latency)
    play([run])
    assert run.worst(run.tenth) < GOOD


@pytest.mark.parametrize("latency", [CONSTANT, LOG_NORMAL])
@pytest.mark.parametrize("owner", ["a", "b"])
def test_a_second_batch_comes(latency: Latency, owner: str) -> None:
    first = Run(10_000, latency=latency)
    second = Run(5_000, owner=owner, deadline=86_500, comes=60.0, latency=latency)
    play([first, second])
    assert first.worst(first.tenth if owner == "a" else 61.0) < GOOD
    assert second.worst(second.tenth) < GOOD
    if owner == "b":  # nobody could know before
        assert first.worst(first.tenth) > GOOD


def test_an_urgent_batch_comes() -> None:
    first = Run(10_000)
    second = Run(2_000, deadline=3_600, comes=40.0)
    play([first, second])
    assert second.end < first.end
    assert first.worst(41.0) < GOOD
    assert second.worst(second.tenth) < GOOD


def test_slots_that_fill_slowly_are_soon_forgotten() -> None:
    run = Run(20_000)
    play([run], capacity=lambda now: min(64, 8 + int(4 * now)))
    assert run.worst(run.tenth) < GOOD


def test_a_change_of_the_upstream_is_followed() -> None:
    run = Run(20_000)
    play([run], capacity=lambda now: 64 if now < 100 else 32)
    assert run.end > 500
    assert run.worst(100 + forecast.LONGEST) < 0.03


def test_work_after_idleness_is_measured_anew() -> None:
    pace = Pace()
    fast = Progress(id="1", owner="a", weight=1, deadline=10**6, left=0, done=9_000, since=0.0)
    pace.observe(9.0, [fast], 0)
    assert pace.rate(9.0) == 1_000
    pace.observe(10.0, [], {"1": 10_000})
    slow = Progress(id="2", owner="a", weight=1, deadline=10**6, left=90, done=10, since=500.0)
    assert pace.begins([slow]) == 500.0
    pace.observe(510.0, [slow], 0)
    assert pace.rate(510.0) == 1


def test_nothing_is_known_before_the_first_result() -> None:
    pace = Pace()
    assert pace.rate(1.0) is None
    pace.observe(1.0, [], {})
    pace.observe(2.0, [Progress(id="1", owner="a", weight=1, deadline=9, left=5, done=0, since=1.5)], 0)
    assert pace.rate(2.0) is None


BATCHES = st.lists(
    st.builds(
        Progress,
        id=st.uuids().map(str),
        owner=st.sampled_from("abc"),
        weight=st.sampled_from([1.0, 2.0]),
        deadline=st.integers(0, 10_000),
        left=st.integers(0, 1_000),
        done=st.just(0),
        since=st.none(),
    ),
    max_size=12,
    unique_by=lambda batch: batch.id,
)


@given(BATCHES, st.booleans())
def test_all_work_is_done_at_the_rate_and_an_owners_batches_end_in_order(batches: list[Progress], many: bool) -> None:
    running = sorted(batches, key=lambda batch: batch.deadline)
    with pytest.MonkeyPatch.context() as patch:
        if many:
            patch.setattr(forecast, "MAX_STEPS", 0)
        found = ends(running, 10.0, 0.0)
    assert found.keys() == {batch.id for batch in running}
    if running:
        assert max(found.values()) == pytest.approx(sum(batch.left for batch in running) / 10.0, abs=1e-3)
    for owner in "abc":
        times = [found[batch.id] for batch in running if batch.owner == owner]
        assert times == sorted(times)


def asks(model: str | None) -> Progress:
    return Progress(id=f"of {model}", owner="a", weight=1.0, deadline=9, left=1, done=0, since=None, model=model)


def named(running: list[Progress], *lists: str) -> dict[str, list[str | None]]:
    """The models of the batches of each group; lists are written as one letter for each model."""
    found = groups(running, [frozenset(models) for models in lists])
    return {name: [batch.model for batch in group.batches] for name, group in found.items()}


def test_batches_that_share_no_upstream_are_apart() -> None:
    running = [asks(model) for model in "zxyx"]
    assert named(running, "xw", "y", "zv") == {"v": ["z"], "w": ["x", "x"], "y": ["y"]}
    assert named(running, "xw", "xw", "y", "zv", "vw") == {"v": ["z", "x", "x"], "y": ["y"]}, "by way of another"
    assert groups(running, [frozenset("xw"), frozenset("yz")])["w"].models == frozenset("xw")


@pytest.mark.parametrize("lists", [(), ("xyz",), ("x", "y", "z", ""), ("x", "y")])
def test_where_any_upstream_may_do_any_batch_all_are_one(lists: tuple[str, ...]) -> None:
    """Where there is none, one alone, one without a list, and where a model is on no list."""
    running = [asks(model) for model in "xyz"]
    assert named(running, *lists) == {"": ["x", "y", "z"]}
    assert groups(running, [])[""].models is None
    assert named([], "x", "y") == {}


def test_a_batch_of_several_models_joins_all() -> None:
    assert named([asks("x"), asks(None)], "x", "y") == {"": ["x", None]}
