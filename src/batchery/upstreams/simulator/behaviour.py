"""How the simulator behaves, as one immutable value: how long it takes, how much it does at once, what goes wrong.

It checks itself when it is made, so that no other part needs to. It must never hold state, read a clock or draw a
number: what becomes of one request is decided in `outcomes`, from this value alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_TOKENS = 100_000
MAX_DIMENSIONS = 4096


@dataclass(frozen=True, slots=True)
class Uniform:
    """A latency drawn evenly between `low` and `high`, in seconds."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < math.inf:
            raise ValueError(f"a uniform latency needs 0 <= low <= high, not {self.low}-{self.high}")


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A latency with a long tail: `median` in seconds, `sigma` the standard deviation of its logarithm."""

    median: float
    sigma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.median < math.inf:
            raise ValueError(f"a lognormal latency needs a median above 0, not {self.median}")
        if not 0 <= self.sigma <= 10:
            raise ValueError(f"a lognormal latency needs a sigma between 0 and 10, not {self.sigma}")


Schedule = tuple[tuple[float, float], ...]
"""(from when, in seconds since the start or the last reset; a number), the first from 0."""

Latency = float | Uniform | LogNormal
"""A constant number of seconds, or a distribution of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What a simulator does. Rates are shares of the requests, from 0 to 1; times are seconds.

    Every draw depends on `seed`, the prompt and the number of the attempt at this prompt, and on nothing else, so a run
    has the same outcomes in whatever order its requests arrive, and a retry is a new draw.

    Args:
        latency: time to an answer, besides what the tokens add.
        token_latency: time that each completion token adds to an answer.
        concurrency: requests worked on at once; others wait in the order they came. 0: no limit. Or a schedule of it;
            when it falls, what is worked on goes on.
        slowdown: how much longer a request takes that is begun when all slots are taken: 1 for twice as long; in
            proportion when some are. Of no effect with any number of slots.
        interactive: requests a second that others send to the same slots, in a schedule; of the same latencies, at
            random times.
        max_queue: requests that may wait; one more is answered 429. None: no limit.
        tokens: completion tokens of an answer: a number, or (fewest, most). Never more than the request allows.
        dimensions: numbers in an embedding where the request does not say.
        error_rates: status (400-599) to the rate of such answers, in OpenAI's error shape.
        html_rates: status (200-599) to the rate of HTML pages in place of JSON.
        stall_rate: accepted, and never answered: the slot stays taken until the client gives up.
        reset_rate: connection reset before the first byte of the answer.
        truncate_rate: connection closed halfway through the body of a 200.
        malformed_rate: a 200 of the promised length whose body is JSON cut short.
        fail_attempts: the first so many attempts at each prompt fail and all later ones succeed; the rates then only
            say in which mix (500 where there are none).
        retry_after: seconds in the `Retry-After` of a 429 or 503; None leaves the header out.
        outages: (start, end) in seconds since the start or the last reset, during which every request is answered 503.
        prefix_cache: blocks of 16 tokens in the prefix cache; the part of a prompt that is in it is reported as
            `cached_tokens`. 0: no cache.
        uncached_latency: time that each prompt token adds that is not in the cache.
        line_separator: answers carry U+2028, U+2029 and U+0085, and bodies are pretty-printed over many lines.
        models: the models served, others being answered 404; empty serves any.
        seed: what all draws start from.
        api_key: the bearer key that requests must carry; None asks for none.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    latency: Latency = 0.0
    token_latency: float = 0.0
    concurrency: int | Schedule = 256
    slowdown: float = 0.0
    interactive: Schedule = ()
    max_queue: int | None = None
    tokens: int | tuple[int, int] = 16
    dimensions: int = 8
    error_rates: Mapping[int, float] = field(default_factory=dict)
    html_rates: Mapping[int, float] = field(default_factory=dict)
    stall_rate: float = 0.0
    reset_rate: float = 0.0
    truncate_rate: float = 0.0
    malformed_rate: float = 0.0
    fail_attempts: int = 0
    retry_after: int | None = 1
    outages: tuple[tuple[float, float], ...] = ()
    prefix_cache: int = 0
    uncached_latency: float = 0.0
    line_separator: bool = False
    models: tuple[str, ...] = ()
    seed: int = 1
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.latency, Uniform | LogNormal) and not 0 <= self.latency < math.inf:
            raise ValueError(f"latency must be 0 or more seconds, not {self.latency}")
        if not 0 <= self.token_latency < math.inf:
            raise ValueError(f"token_latency must be 0 or more seconds, not {self.token_latency}")
        self._check_schedules()
        if not 0 <= self.uncached_latency < math.inf:
            raise ValueError(f"uncached_latency must be 0 or more seconds, not {self.uncached_latency}")
        for name in ("max_queue", "fail_attempts", "retry_after", "slowdown", "prefix_cache"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise ValueError(f"{name} must be 0 or more, not {number}")
        low, high = self.token_range
        if not 1 <= low <= high <= MAX_TOKENS:
            raise ValueError(f"tokens must be a number or a range between 1 and {MAX_TOKENS}, not {low}-{high}")
        if not 1 <= self.dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"dimensions must be between 1 and {MAX_DIMENSIONS}, not {self.dimensions}")
        for start, end in self.outages:
            if not 0 <= start < end:
                raise ValueError(f"an outage must start before it ends, not {start}-{end}")
        if self.api_key == "":
            raise ValueError("api_key must not be empty")
        self._check_rates()

    def _check_schedules(self) -> None:
        for name, schedule in (("concurrency", self.slots), ("interactive", self.interactive)):
            times = [since for since, _ in schedule]
            if times and (times[0] != 0 or any(after <= before for before, after in itertools.pairwise(times))):
                raise ValueError(f"the schedule of {name} must begin at 0s and go on from there, not {times}")
            if any(not 0 <= number < math.inf for _, number in schedule):
                raise ValueError(f"{name} must be 0 or more")

    @property
    def slots(self) -> Schedule:
        """The schedule of `concurrency`, also where that is one number."""
        return ((0.0, self.concurrency),) if isinstance(self.concurrency, int) else self.concurrency

    def _check_rates(self) -> None:
        for status in self.error_rates:
            if not 400 <= status <= 599:
                raise ValueError(f"error_rates needs statuses between 400 and 599, not {status}")
        for status in self.html_rates:
            if not 200 <= status <= 599 or status in (204, 304):
                raise ValueError(f"html_rates needs statuses between 200 and 599 that carry a body, not {status}")
        rates = [
            *(("error_rates", rate) for rate in self.error_rates.values()),
            *(("html_rates", rate) for rate in self.html_rates.values()),
            *((name, getattr(self, name)) for name in ("stall_rate", "reset_rate", "truncate_rate", "malformed_rate")),
        ]
        for name, rate in rates:
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {rate}")
        # One draw decides between all faults, so together they cannot be more than everything.
        total = math.fsum(rate for _, rate in rates)
        if total > 1 + 1e-9:
            raise ValueError(f"the rates of all faults together must be at most 1, not {total:g}")

    @property
    def token_range(self) -> tuple[int, int]:
        """The fewest and the most completion tokens of an answer."""
        return (self.tokens, self.tokens) if isinstance(self.tokens, int) else self.tokens

    def in_outage(self, elapsed: float) -> bool:
        """Whether an outage is on, `elapsed` seconds after the start."""
        return any(start <= elapsed < end for start, end in self.outages)
