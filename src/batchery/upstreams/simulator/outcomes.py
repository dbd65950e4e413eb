"""What becomes of one request: how long it takes, how many tokens it gets, and which fault, if any, befalls it.

Pure: every decision follows from the behaviour, the prompt's fingerprint and the number of the attempt. It must never
look at the clock, at the order of arrival or at how much else is going on, or runs would no longer repeat.
"""

from __future__ import annotations

import math
import re
from enum import Enum
from statistics import NormalDist
from typing import NamedTuple

from batchery.upstreams.simulator.behaviour import Behaviour, LogNormal, Uniform
from batchery.upstreams.simulator.options import parse_duration

DIRECTIVE_MARK = b"[[simulate "

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_DIRECTIVE = re.compile(rb"\[\[simulate ([^\[\]]*)\]\]")
_STANDARD_NORMAL = NormalDist()


class Fault(Enum):
    """What can go wrong with an answer."""

    STATUS = "status"
    HTML = "html"
    STALL = "stall"
    RESET = "reset"
    TRUNCATE = "truncate"
    MALFORMED = "malformed"


WORKING_FAULTS = (Fault.TRUNCATE, Fault.MALFORMED)
"""Faults of an answer that was made: it took the time its tokens take."""


class Outcome(NamedTuple):
    """What is going to happen: after `delay` seconds in a slot, `fault` (None: a whole answer) with `status`."""

    delay: float
    fault: Fault | None = None
    status: int = 200


class Directive(NamedTuple):
    """An order inside a prompt, such as `[[simulate status=500 times=2]]`.

    Args:
        fault: what must go wrong; None leaves that to the draw.
        status: of the answer, where the fault has one.
        latency: seconds, in place of the drawn ones; None leaves them.
        times: attempts at the prompt that obey it; None: all.
    """

    fault: Fault | None = None
    status: int = 200
    latency: float | None = None
    times: int | None = None

    def override(self, outcome: Outcome, attempt: int) -> Outcome:
        """The outcome of the prompt's `attempt` (from 1) under this directive."""
        if self.times is not None and attempt > self.times:
            return outcome
        delay = outcome.delay if self.latency is None else self.latency
        if self.fault is None:
            return outcome._replace(delay=delay)
        return Outcome(delay, self.fault, self.status)


def read_directive(prompt: bytes) -> Directive | None:
    """The directives in a prompt's canonical text, taken together; None where there is none.

    Raises:
        ValueError: a directive is not understood, which must not look like one that was obeyed.
    """
    if DIRECTIVE_MARK not in prompt:
        return None
    directive = Directive()
    orders = [order for text in _DIRECTIVE.findall(prompt) for order in text.decode(errors="replace").split()]
    if not orders:
        raise ValueError("a directive is empty or has no end; write [[simulate status=500]]")
    for order in orders:
        directive = _obey(directive, order)
    return directive


def _obey(directive: Directive, order: str) -> Directive:
    match order.partition("="):
        case ("stall" | "reset" | "truncate" | "malformed" as name, "", ""):
            return directive._replace(fault=Fault(name), status=200)
        case ("html", "", ""):
            return directive._replace(fault=Fault.HTML, status=502)
        case ("status" | "html" as name, "=", status) if re.fullmatch(r"[45][0-9]{2}", status, re.ASCII):
            return directive._replace(fault=Fault(name), status=int(status))
        case ("html", "=", "200"):
            return directive._replace(fault=Fault.HTML, status=200)
        case ("latency", "=", duration):
            return directive._replace(latency=parse_duration(duration))
        case ("times", "=", times) if re.fullmatch(r"[0-9]{1,9}", times, re.ASCII):
            return directive._replace(times=int(times))
    raise ValueError(
        f"the directive {order[:64]!r} is not understood; there are status=500, html=502, stall, reset, truncate, "
        "malformed, latency=2s and times=2"
    )


def _mix(number: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): spreads 64 bits evenly, the same on every machine."""
    number = (number + _GOLDEN) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


class Dice:
    """All draws under one behaviour, each a pure function of a fingerprint and an attempt.

    Args:
        behaviour: whose seed, rates and distributions are drawn from.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._tokens_seed, self._latency_seed, self._fault_seed = (
            _mix(_mix(behaviour.seed & _MASK) ^ purpose) for purpose in (1, 2, 3)
        )
        self._ladder: list[tuple[float, Fault, int]] = []
        total = 0.0
        for fault, status, rate in (
            *((Fault.STATUS, status, rate) for status, rate in sorted(behaviour.error_rates.items())),
            *((Fault.HTML, status, rate) for status, rate in sorted(behaviour.html_rates.items())),
            (Fault.STALL, 200, behaviour.stall_rate),
            (Fault.RESET, 200, behaviour.reset_rate),
            (Fault.TRUNCATE, 200, behaviour.truncate_rate),
            (Fault.MALFORMED, 200, behaviour.malformed_rate),
        ):
            if rate > 0:
                total += rate
                self._ladder.append((total, fault, status))
        if behaviour.fail_attempts and not self._ladder:
            self._ladder.append((1.0, Fault.STATUS, 500))

    def tokens(self, fingerprint: int) -> int:
        """Completion tokens of an answer; the same in every attempt, so that its text can be foretold."""
        low, high = self._behaviour.token_range
        return low if low == high else low + int(self._draw(self._tokens_seed, fingerprint, 0) * (high - low + 1))

    def outcome(self, fingerprint: int, attempt: int, tokens: int) -> Outcome:
        """What becomes of a prompt's `attempt` (from 1), if its answer has so many completion tokens."""
        delay = self._latency(fingerprint, attempt)
        fault, status = self._fault(fingerprint, attempt) if self._ladder else (None, 200)
        if fault is None or fault in WORKING_FAULTS:
            delay += tokens * self._behaviour.token_latency
        return Outcome(delay, fault, status)

    def _latency(self, fingerprint: int, attempt: int) -> float:
        latency = self._behaviour.latency
        if isinstance(latency, Uniform):
            return latency.low + self._draw(self._latency_seed, fingerprint, attempt) * (latency.high - latency.low)
        if isinstance(latency, LogNormal):
            deviation = _STANDARD_NORMAL.inv_cdf(self._draw(self._latency_seed, fingerprint, attempt))
            return latency.median * math.exp(latency.sigma * deviation)
        return latency

    def _fault(self, fingerprint: int, attempt: int) -> tuple[Fault | None, int]:
        must_fail = attempt <= self._behaviour.fail_attempts
        if self._behaviour.fail_attempts and not must_fail:
            return None, 200
        draw = self._draw(self._fault_seed, fingerprint, attempt)
        if must_fail:
            draw *= self._ladder[-1][0]
        for upto, fault, status in self._ladder:
            if draw < upto:
                return fault, status
        return None, 200

    @staticmethod
    def _draw(seed: int, fingerprint: int, attempt: int) -> float:
        """An even draw, above 0 and below 1."""
        return ((_mix(seed ^ fingerprint ^ (attempt * _GOLDEN & _MASK)) >> 12) + 0.5) / (1 << 52)
