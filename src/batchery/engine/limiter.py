"""The limiter: how many requests an upstream should have in flight, found by trying.

It knows nothing of an upstream but how its answers come. It looks for the smallest number in flight that does
(nearly) the most work a second, by comparing rounds: some at the present number, some a step above or below it. A step
up is kept when work grows with it, a step down when work does not shrink with it. Both are judged by elasticity, the
relative change of work for a relative change of the number: 1 while there is capacity left, 0 beyond what a server can
do at a time. Where a step up has paid in full, and at the very start, the number then grows by one for each answer, as
TCP's slow start does, until answers take longer or are refused: so a capacity that has quadrupled is found in a few
answer times.

Refusals ("too much": 429, 503, no answer in time) end a step up at once, and a number at which they came is then closed
in on from below, with several hundred answers between two tries, so that few calls are wasted. Where they come in
numbers without a step, capacity has gone, and the number falls. Some servers refuse a share of all requests whatever
the number is; that share is learned at rest, and only more than that counts.

Pure: the clock is an argument. Rounds in which there was too little to send decide nothing.
"""

from __future__ import annotations

import math

from batchery.engine.growth import Growth
from batchery.engine.refusals import MOST_BACKGROUND, Refusals
from batchery.engine.round import Round

START = 32
CEILING = 2_048

ELASTICITY = 0.06
"""The least gain of work for a step, relative to it. A server whose answers take longer the more it has to do is used
to 94 % of what it could do at best; the rest would take ever more requests in flight."""

ROUND = 3
"""How often the number in flight must complete for a round to be measured."""

LEAST_RESULTS = 128
LONGEST_ROUND, TOLERANCE = 20.0, 0.05
"""Seconds after which a round is measured with what it has, if that is at least the number in flight and its work is
known with this relative standard error."""

SMALLEST_STEP, FIRST_STEP, LARGEST_STEP = 1.2, 1.5, 4.0

PAID = 0.6
"""The gain of work for a step up, relative to it, from which the number grows with each answer."""

QUEUED = 1.3
"""How much longer than at their quickest answers take when a smaller number is tried as often as a larger one."""

RESTS = 3
"""Rounds between two tries, once neither direction has helped."""

TRIES_DOWN, MOST_TRIES_DOWN = 4, 32
"""A step down, which may cost work, is tried only every so many times, twice as many each time that it has cost some,
unless something has changed."""

UNSEEN = 0.01
"""The relative loss of work for a step down that does not count: rounds differ by more."""

DOUBT = 0.7
"""Standard errors by which work at a smaller number must beat what would do for a step down. Where answers are few and
differ much, rounds differ more than the numbers do; and too few in flight cost work, where some too many cost none."""

LEAPS, MOST_LEAPS = 8, 256
"""Steps down before one goes straight to what should fit, after such a one has cost work; twice as many each time."""

SHIFT = 0.3
"""The relative change of work between two rounds at the same number that says: something has changed."""

FIRST_CUT, CUT = 0.95, 0.7
"""What is left of the number when refusals come in numbers. At first it may be too much by one only, which is refused
as often as it is sent again; where they go on, capacity has gone."""

REFUSED_SHARE = 0.05
"""The share of refusals from which capacity has gone, where no step was taken; a few come from any server."""

IN_USE = 0.5
"""The share of the number that must be in flight for a refusal to be about the number."""

LEAST_ANSWERS = 20
ANSWERS_A_REFUSAL = 300
"""Answers between two tries at a number where refusals came: each try costs about one of them."""
SHYNESS, MOST_SHYNESS = 60.0, 960.0
"""Seconds after which the number grows as at the start where answers are so few that as many would take longer: an hour
for one at a time of 10 s. Twice as many each time that it comes to no more, as each such try costs a few refusals."""


class AdaptiveLimit:
    """A number that finds itself.

    Args:
        start: the first.
        ceiling: the highest.

    Attributes:
        limit: requests that may be in flight now.
    """

    def __init__(self, start: int = START, ceiling: int = CEILING) -> None:
        self._ceiling = ceiling
        self._base = self.limit = self._target = min(start, ceiling)
        self._work_at_base: float | None = None
        self._error_at_base = 0.0
        self._latency_at_base: float | None = None
        self._least_latency = math.inf
        self._growth: Growth | None = Growth(float("-inf"), self.limit, None)
        self._up = True
        self._step = FIRST_STEP
        self._rests = 0
        self._until_down = 0
        self._tries_down = TRIES_DOWN
        self._rate_at_base = 0.0
        self._leap = False  # whether the step down under way goes straight to what should fit
        self._until_leap = 0
        self._leaps = LEAPS // 2
        # Refusals: at what number they came, and how many since when.
        self._refused_at: int | None = None
        self._since_refused = 0
        self._refused_when = float("-inf")
        self._shyness = SHYNESS
        self._shy_at = 0
        self._refusals = Refusals()
        self._overshot = False  # whether refusals of one step too many are still coming in
        self._falling = False  # whether there was a cut, and no measured round since then
        self._fell_from = self._fits = 0
        self._doubted = 0.0  # the share of refusals that a step down is to explain
        self._round = Round()

    def answered(self, now: float, *, began: float, in_flight: int, work: float) -> None:
        if began >= self._refusals.since:
            self._refusals.ended += 1
            self._since_refused += 1
            if self._overshot and self._refused_at is not None:
                # All refusals are in: what was not refused fits.
                self._overshot = False
                self._go_to(max(self._base, self._refused_at - 1), now)
                return
        if self._growth is not None:
            self._grow(now, began, in_flight, self._growth)
            return
        if self.limit < self._target:
            # One more for each that completes, so that a server which refuses does so to few.
            self.limit += 1
            if self.limit == self._target:
                self._begin_round(now, self._base)
            return
        if self.limit == self._base and self._refused_at is not None and self._is_long_ago(now):
            more = self._base > 1.1 * self._shy_at
            self._shyness = SHYNESS if more else min(MOST_SHYNESS, 2 * self._shyness)
            self._shy_at = self._base
            self._refused_at = None
            self._begin_growing(now)
            return
        if self._is_closing_in():
            if began < self._round.changed_at:
                return  # it does not tell whether there is room for the number that there is now
            self._round.settled()
        if not self._round.add(now, began=began, in_flight=in_flight, work=work) or not self._is_enough(now):
            return
        if not self._round.was_filled(self.limit):
            self._began_short(now)
        elif self.limit == self._base:
            self._measured_at_rest(now, self._round.rate(now))
        else:
            self._measured_a_step(now, self._round.rate(now))

    def refused(self, now: float, *, began: float, in_flight: int) -> None:
        if in_flight < IN_USE * self.limit:
            return  # a few that are always refused, while there is little else to send, say nothing of the number
        refusals = self._refusals
        if began < refusals.since:
            # Too much by one more; what follows from it has been done already.
            if self._overshot and self._refused_at is not None:
                self._refused_at = max(self._base + 1, self._refused_at - 1)
            return
        refusals.ended += 1
        refusals.refused += 1
        refusals.took = now - began
        number = min(self.limit, in_flight)
        if self._growth is not None:
            if refusals.refused > refusals.usual:
                before = self._growth.number_at(began)
                self._note_refusal(number, now)
                self._growth, self._overshot = None, True
                # What there was when it was sent may be too much by it alone; what has been added since by all of that.
                self._go_to(max(self._base, min(number - 1, before)), now)
                self._up, self._step = True, SMALLEST_STEP
        elif self.limit > self._base:
            if refusals.refused > refusals.usual:
                self._note_refusal(self.limit, now)
                self._overshot = self.limit > self._base + 1
                self._go_to(self._base, now)
                self._up, self._step = True, SMALLEST_STEP
                self._rests = 0
        elif self.limit == 1:
            # It cannot be the number, so neither was it before.
            if refusals.ended >= LEAST_ANSWERS:
                if refusals.share <= MOST_BACKGROUND:
                    refusals.learn(refusals.share)
                self._refused_at = None
                self._begin_growing(now)
        elif refusals.refused >= max(2.0, REFUSED_SHARE * max(20, self.limit)) and (
            refusals.refused > REFUSED_SHARE * refusals.ended + refusals.usual
        ):
            self._cut(number, now)

    def _cut(self, number: int, now: float) -> None:
        """Refusals come in numbers: there is less capacity; or they do not depend on the number."""
        share = self._refusals.share
        if self._falling and share <= MOST_BACKGROUND:
            if self._refusals.ended < number:
                return  # quick answers come first: what share is refused, all that were sent first are needed to know
            if number <= self._fits:
                self._falling = False
                self._go_to(self._fell_from, now)
                self._learn_background(share, now)
                return
        # What was answered of a higher number fits, whatever the capacity is; the count at the first cut of several has
        # answers in it from before the capacity went.
        self._fits = math.floor((1 - share) * number) if self._falling else 0
        self._note_refusal(number, now)
        self._go_to(math.floor(number * (CUT if self._falling else FIRST_CUT)), now)
        if not self._falling:
            self._falling, self._fell_from = True, number
        self._up, self._step, self._rests = True, SMALLEST_STEP, 0
        self._tries_down = TRIES_DOWN

    def _note_refusal(self, number: int, now: float) -> None:
        self._refused_at, self._since_refused, self._refused_when = number, 0, now

    def _is_long_ago(self, now: float) -> bool:
        """Whether the last refusal at a number says nothing any more, though there were too few answers to try it."""
        return self._since_refused < ANSWERS_A_REFUSAL and now - self._refused_when >= self._shyness

    def _is_enough(self, now: float) -> bool:
        """Whether the round is to be judged."""
        results = self._round.results
        if self._is_closing_in():
            # A server that has no room for one more says so within the time that its last refusal took.
            return results >= max(LEAST_ANSWERS, self.limit) and now - self._round.changed_at > 2 * self._refusals.took
        if results >= max(LEAST_RESULTS, ROUND * self.limit):
            return True
        return results >= self.limit and self._round.seconds(now) > LONGEST_ROUND and self._round.error < TOLERANCE

    def _is_closing_in(self) -> bool:
        """Whether the number lies between the one that has proved good and the one at which refusals came: so near to
        each other, rounds differ by more than the number does, and refusals alone tell."""
        return self._refused_at is not None and self._base < self.limit <= self._refused_at

    def _learn_background(self, share: float, now: float) -> None:
        """That share comes at a smaller number as well."""
        if self._refusals.learn(share):
            self._refused_at = None
            self._begin_growing(now)

    def _grow(self, now: float, began: float, in_flight: int, growth: Growth) -> None:
        """Another for each answer, until answers take longer and no more work is done."""
        if in_flight >= 0.9 * self.limit and self.limit < self._ceiling:
            self.limit += 1
            growth.grew(now, self.limit)
        seen = growth.count(now, began, self.limit)
        if seen is None:
            return
        seconds, results, latency = seen
        if growth.latency is None:
            self._latency_at_base = self._least_latency = latency
        gain = ELASTICITY * math.log(2)
        if growth.has_ended(now, seconds, results, latency, ceiling=self._ceiling, gain=gain):
            self._growth = None
            self._go_to(max(self._base, growth.enough(ELASTICITY / 2)), now)

    def _begin_growing(self, now: float) -> None:
        self._growth = Growth(now, self.limit, self._latency_at_base)
        self._refusals.begin(now)
        self._begin_round(now)

    def _measured_at_rest(self, now: float, work: float) -> None:
        before, was_queued = self._work_at_base, self._is_queued()
        self._note_latency()
        share = self._refusals.share
        # Just after a cut some may be left of the ones before.
        doubtful = self._refusals.are_doubtful and not self._falling
        self._falling = False
        self._refusals.fade()
        self._refusals.begin(now)
        if before is None:
            self._work_at_base = work
            self._error_at_base = self._round.error
        elif abs(math.log(work / before)) > SHIFT:
            # Less work from the same number: there is less capacity, and a smaller number may do as well. This round
            # may be half of the time before, so the next one counts.
            self._work_at_base = None
            self._up, self._step, self._rests = work > before, 1.5, 0
            self._until_down = self._until_leap = 0
            self._leaps = LEAPS // 2
            self._tries_down = TRIES_DOWN
            self._begin_round(now)
            return
        else:
            self._work_at_base = math.sqrt(before * work)
            if was_queued and not self._is_queued():
                # No request waits any longer, so a larger number may do more.
                self._up, self._step, self._rests = True, FIRST_STEP, 0
            self._error_at_base = math.hypot(self._round.error, self._error_at_base) / 2
        if doubtful and self._base > 1:
            self._doubted = share
            self._up, self._step = False, SMALLEST_STEP
            self._take_a_step(now)
        elif self._rests > 0 and not (self._refused_at == self._base + 1 and self._since_refused >= ANSWERS_A_REFUSAL):
            self._rests -= 1
            self._begin_round(now)
        else:
            self._take_a_step(now)

    def _measured_a_step(self, now: float, work: float) -> None:
        before = self._base
        self._falling = False
        if self._doubted:
            self._measured_below(now)
            return
        if self._is_closing_in():
            was_refused = self.limit == self._refused_at
            self._note_latency()
            self._go_to(self.limit, now)
            if was_refused:
                # It has room for it, so there is more capacity now; how much more is found out as at the start.
                self._refused_at = None
                self._begin_growing(now)
            else:
                self._take_a_step(now)
            return
        if self._work_at_base is None:
            self._go_to(self._base, now)  # refusals that were still coming in have changed what is known
            return
        gain = math.log(work / self._work_at_base) - ELASTICITY * math.log(self.limit / self._base)
        doubt = DOUBT * math.hypot(self._round.error, self._error_at_base)
        if gain > (0.0 if self.limit > before else -UNSEEN + doubt):
            self._leap = False
            if self.limit < before:
                self._tries_down = TRIES_DOWN
            paid = self.limit > before and gain > (PAID - ELASTICITY) * math.log(self.limit / before)
            self._base, self._work_at_base = self.limit, work
            self._error_at_base = self._round.error
            self._step = min(LARGEST_STEP, self._step * 1.25)
            self._note_latency()
            self._refusals.begin(now)
            if self.limit < before and not self._is_queued():
                # No request waits any longer, so a still smaller number would cost work, and a larger one may do more.
                self._up, self._step = True, FIRST_STEP
            if paid and self._refused_at is None:
                self._begin_growing(now)
            else:
                self._take_a_step(now)
            return
        if self.limit < self._base and self._leap:
            self._until_leap = self._leaps = min(MOST_LEAPS, 2 * self._leaps)
        cost = self.limit < before and math.log(work / self._work_at_base) < PAID * math.log(self.limit / before)
        self._go_to(before, now)
        if cost:
            # So no request waits at the number that there was, and a larger one may do more.
            self._leap = False
            self._up, self._step = True, FIRST_STEP
        elif self._leap:
            self._leap = False
        elif self._step > SMALLEST_STEP:
            self._step = max(SMALLEST_STEP, math.sqrt(self._step))  # what fits lies between
        else:
            self._turn()

    def _measured_below(self, now: float) -> None:
        """Refusals that a smaller number does not keep away are the server's way; others mean that it was too much."""
        before, share, doubted = self._base, self._refusals.share, self._doubted
        self._up, self._step, self._rests = True, SMALLEST_STEP, 0
        if share > doubted / 4:
            self._go_to(before, now)
            self._learn_background((share + doubted) / 2, now)
        else:
            self._go_to(self.limit, now)
            self._note_refusal(before, now)

    def _turn(self) -> None:
        """This direction is of no use: try the other, or rest."""
        self._step = SMALLEST_STEP
        if self._up and (self._is_queued() or self._until_down <= 0):
            self._up, self._until_down = False, self._tries_down
            self._tries_down = min(MOST_TRIES_DOWN, 2 * self._tries_down)
            return
        self._until_down -= 1
        self._up, self._rests = True, RESTS

    def _note_latency(self) -> None:
        self._latency_at_base = self._round.latency
        self._rate_at_base = self.limit / max(1e-6, self._latency_at_base)
        # The quickest is forgotten slowly, as later requests may be longer.
        self._least_latency = min(1.02 * self._least_latency, self._latency_at_base)

    def _take_a_step(self, now: float) -> None:
        target = self._upwards() if self._up else self._downwards()
        if target is None or target == self._base:
            self._turn()
            self._begin_round(now)
            return
        self._target = target
        if target < self._base:
            self.limit = target
            self._begin_round(now, self._base)

    def _upwards(self) -> int | None:
        """The next number above the base; None where none is to be tried now."""
        target = min(self._ceiling, max(self._base + 1, round(self._base * self._step)))
        at = self._refused_at
        if at is not None and target >= at:
            if at - self._base > max(1, 0.03 * self._base):
                target = (self._base + at) // 2
            elif self._since_refused >= ANSWERS_A_REFUSAL:
                target = self._base + 1
            else:
                return None
        return target if target > self._base else None

    def _downwards(self) -> int:
        """The next number below the base."""
        if self._is_queued() and self._work_at_base is not None:
            self._until_leap -= 1
            # By Little's law, what is done in the time of an unhindered answer is what the server works on at a time.
            fits = math.ceil(1.1 * self._rate_at_base * self._least_latency)
            if self._until_leap < 0 and fits < self._base / self._step:
                self._leap = True
                return max(1, self._base // 4, fits)
        return max(1, min(self._base - 1, round(self._base / self._step)))

    def _is_queued(self) -> bool:
        return (self._latency_at_base or 0.0) > QUEUED * self._least_latency

    def _go_to(self, limit: int, now: float) -> None:
        limit = max(1, min(self._ceiling, limit))
        if limit != self._base:
            self._work_at_base = None
        former, self._base, self.limit, self._target = self.limit, limit, limit, limit
        if self._refused_at is not None:
            # A refusal with no more in flight than have proved good was not about the number; one more is tried soon.
            self._refused_at = max(self._refused_at, limit + 1)
        self._doubted = 0.0
        self._refusals.begin(now)
        self._begin_round(now, former)

    def _began_short(self, now: float) -> None:
        """There was too little to send: nothing is learned, and nothing above what was used is known to be good."""
        if self.limit != self._base:
            self._go_to(self._base, now)
        else:
            self._begin_round(now)

    def _begin_round(self, now: float, former: int | None = None) -> None:
        """Measure anew; if the number has changed just now, from which."""
        changed = former is not None and former != self.limit
        self._round.begin(now, unsettled=max(former or 0, self.limit) if changed else 0)
