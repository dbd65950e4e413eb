"""The limiter finds what an upstream can do, follows it when it changes, and wastes few calls on the way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest

from batchery.engine.limit import FixedLimit, Limit
from batchery.engine.limiter import AdaptiveLimit
from tests.engine.capacity import Over, run
from tests.engine.decoding import decode

Latency = Callable[[random.Random], float]


def steady(draw: random.Random) -> float:
    return 0.05


def jittered(draw: random.Random) -> float:
    return 0.05 * math.exp(draw.gauss(0, 0.3))


def lognormal(draw: random.Random) -> float:
    """As of a model: a median of 1 s, and answers of very different lengths."""
    return math.exp(draw.gauss(0, 0.5))


def falls_and_rises(now: float) -> int:
    return 64 if 20 <= now < 40 else 256


def best(over: Over, latency: Latency, capacity: int) -> float:
    """Answers a second with the best fixed limit of a few."""
    limits = [capacity] if over != "slow" else [capacity, 4 * capacity, 2_048]
    found = [
        run(FixedLimit(limit), 12, over=over, capacity=lambda _: capacity, latency=latency).rate(6, 12)
        for limit in limits
    ]
    return max(found)


@pytest.mark.parametrize("over", ["refuse", "queue", "slow"])
@pytest.mark.parametrize("latency", [steady, jittered])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_keeps_to_what_the_upstream_can_do(over: Over, latency: Latency, seed: int) -> None:
    course = run(AdaptiveLimit(), 60, over=over, capacity=falls_and_rises, latency=latency, seed=seed)
    large, small = best(over, latency, 256), best(over, latency, 64)
    assert course.rate(3, 20) >= 0.9 * large
    assert course.rate(25, 40) >= 0.9 * small
    assert course.rate(46, 60) >= 0.9 * large
    assert course.wasted < 0.01


@pytest.mark.parametrize("over", ["refuse", "queue"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_keeps_to_it_with_answers_of_a_second(over: Over, seed: int) -> None:
    """Its measure is the answer time, so it takes some tens of them."""
    course = run(AdaptiveLimit(), 60, over=over, capacity=lambda _: 256, latency=lognormal, seed=seed)
    assert course.rate(30, 60) >= 0.9 * best(over, lognormal, 256)
    assert course.wasted < 0.01


def of_a_model(draw: random.Random) -> float:
    """As the simulator's default of log-normal answers, with a median of 0.3 s."""
    return 0.3 * lognormal(draw)


@pytest.mark.parametrize("over", ["refuse", "queue"])
@pytest.mark.parametrize("transit", [0.0, 0.01])
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_capacity_that_comes_back_is_found(over: Over, transit: float, seed: int) -> None:
    """The whole way from the first request on, also where the server's slots are free before its answers arrive."""

    def capacity(now: float) -> int:
        return 64 if 30 <= now < 60 else 256

    course = run(AdaptiveLimit(), 90, over=over, capacity=capacity, latency=of_a_model, seed=seed, transit=transit)
    large, small = best(over, of_a_model, 256), best(over, of_a_model, 64)
    assert course.rate(0, 90) >= 0.9 * (2 * large + small) / 3
    assert course.rate(35, 60) >= 0.9 * small
    assert course.rate(66, 90) >= 0.9 * large
    assert course.wasted < 0.01


@pytest.mark.parametrize("takes", [0.05, 0.3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_refusals_that_take_their_time_are_not_taken_for_the_servers_way(takes: float, seed: int) -> None:
    """As from a server that first lets a request wait. Capacity goes down and up slowly, so there are always some."""

    def capacity(now: float) -> int:
        return round(128 + 40 * math.sin(now / 3))

    course = run(AdaptiveLimit(), 60, over="refuse", capacity=capacity, latency=of_a_model, seed=seed, refusal=takes)
    assert course.wasted < 0.1
    assert course.rate(0, 60) >= 0.75 * best("refuse", of_a_model, 128)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_queue_at_the_upstream_does_not_grow(seed: int) -> None:
    course = run(AdaptiveLimit(), 60, over="queue", capacity=falls_and_rises, latency=jittered, seed=seed)
    assert min(course.limits[15:20]) > 128
    assert sorted(course.limits[30:40])[5] <= 2 * 128


@pytest.mark.parametrize("over", ["refuse", "queue"])
def test_a_server_with_few_slots(over: Over) -> None:
    """Such as llama.cpp: fewer than the limit begins with."""
    course = run(AdaptiveLimit(), 60, over=over, capacity=lambda _: 4, latency=jittered)
    assert course.rate(10, 60) >= 0.9 * best(over, jittered, 4)
    assert course.limits[-1] <= 32


class Moody:
    """A limiter that is told of some of the answers as refusals, whatever the number in flight."""

    def __init__(self, share: float, seed: int) -> None:
        self._limiter = AdaptiveLimit()
        self._share = share
        self._draw = random.Random(seed)

    @property
    def limit(self) -> int:
        return self._limiter.limit

    def answered(self, now: float, *, began: float, in_flight: int, work: float) -> None:
        if self._draw.random() < self._share:
            self._limiter.refused(now, began=began, in_flight=in_flight)
        else:
            self._limiter.answered(now, began=began, in_flight=in_flight, work=work)

    def refused(self, now: float, *, began: float, in_flight: int) -> None:
        self._limiter.refused(now, began=began, in_flight=in_flight)


@pytest.mark.parametrize("over", ["refuse", "queue"])
@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.08, 0.15, 0.3])
@pytest.mark.parametrize("capacity", [64, 256])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_refusals_that_have_nothing_to_do_with_it_are_known_soon(
    over: Over, share: float, capacity: int, seed: int
) -> None:
    """Within some tens of answer times, of 0.34 s here."""
    course = run(Moody(share, seed), 40, over=over, capacity=lambda _: capacity, latency=of_a_model, seed=seed)
    assert course.rate(25, 40) >= 0.8 * best(over, of_a_model, capacity)
    assert course.wasted < 0.03


def test_without_enough_to_send_nothing_is_decided() -> None:
    limiter = AdaptiveLimit(start=32)
    now = 0.0
    for _ in range(10_000):
        now += 0.01
        limiter.answered(now, began=now - 0.05, in_flight=5, work=1.0)
    assert limiter.limit == 32
    assert limiter._growth is not None
    assert len(limiter._growth._seen) == 1  # nor is more and more kept


@pytest.mark.parametrize("in_flight", [20, 32])
def test_a_refusal_of_one_of_the_first_requests_does_not_hold_the_number_down(in_flight: int) -> None:
    """It came with no more in flight than the number begins with, so it says nothing of any higher one."""
    limiter = AdaptiveLimit()
    limiter.refused(0.0, began=-0.01, in_flight=in_flight)
    course = run(limiter, 12, over="refuse", capacity=lambda _: 256, latency=jittered)
    assert course.limits[-1] >= 240
    assert course.rate(6, 12) >= 0.9 * best("refuse", jittered, 256)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_minute_of_nothing_but_refusals_is_over_within_minutes(seed: int) -> None:
    """Answers take 10 s, so with one at a time, what is counted in answers would take an hour."""
    course = run(
        AdaptiveLimit(),
        460,
        over="refuse",
        capacity=lambda now: 0 if 60 <= now < 120 else 256,
        latency=lambda draw: 10 * lognormal(draw),
        refusal=1.0,
        seed=seed,
    )
    assert course.limits[119] <= 2
    assert course.limits[-1] >= 128


def test_a_request_that_is_always_refused_says_nothing_of_the_number() -> None:
    """It is nearly alone: others that come later must not find one slot."""
    limit = AdaptiveLimit()
    for second in range(200):
        limit.refused(float(second), began=second - 0.01, in_flight=1)
    assert limit.limit == 32


def test_an_operators_limit_is_kept_to() -> None:
    course = run(FixedLimit(100), 10, over="refuse", capacity=lambda _: 64, latency=steady)
    assert set(course.limits) == {100}


def test_the_ceiling_is_never_passed() -> None:
    course = run(AdaptiveLimit(ceiling=50), 10, over="queue", capacity=lambda _: 256, latency=steady)
    assert max(course.limits) == 50


class Model(NamedTuple):
    """A model server and what is asked of it, as for `decode`."""

    places: int
    step: float
    each: float
    tokens: float
    spread: float


SMALL_MODEL = Model(1_024, 0.008, 0.00002, 300, 0.6)
LARGE_MODEL = Model(256, 0.025, 0.0001, 500, 0.8)


@pytest.mark.parametrize(("model", "seconds"), [(SMALL_MODEL, 600), (LARGE_MODEL, 1_800)])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_model_server_is_kept_full(model: Model, seconds: int, seed: int) -> None:
    """Answers take 10 to 30 s when it is, and the more there are the longer, though none waits."""

    def tokens(limit: Limit, seconds: int, seed: int) -> tuple[float, list[int]]:
        step, each, mean, spread = model[1:]
        done, limits = decode(
            limit, seconds, places=lambda _: model.places, step=step, each=each, tokens=mean, spread=spread, seed=seed
        )
        return sum(done[seconds // 2 :]) / (seconds - seconds // 2), sorted(limits[seconds // 2 :])

    found, limits = tokens(AdaptiveLimit(), seconds, seed)
    best, _ = tokens(FixedLimit(model.places), 200, 1)
    assert found >= 0.92 * best
    assert limits[len(limits) // 2] <= 3 * model.places
