"""Quotas: how many requests and tokens a minute an upstream may be sent, as its operator or the upstream says.

A quota is kept to exactly: in no 60 seconds are more requests sent than it allows, nor more tokens as far as they can
be known. A request's tokens are estimated when it is sent and corrected when it is answered. Sending is spread over the
minute instead of being done at its beginning, since that is when an upstream's own limits strike.

Pure: the clock is an argument. Each worker has quotas of its own; what several share has to be divided among them.
"""

from __future__ import annotations

from batchery.upstreams.base import RateLimit

MINUTE = 60.0
LONGEST_HOLD = 60.0
"""Seconds that an upstream's own word holds requests back at most; then one is tried."""

BYTES_A_TOKEN = 4
FIRST_OUTPUT = 256.0
"""Tokens that an answer is taken to have before the first has come."""

SMOOTHING = 0.05


class _Pace:
    """At most `rate` units in any minute, evenly: the generic cell rate algorithm (ITU-T I.371) without bursts."""

    def __init__(self, per_minute: float) -> None:
        self._seconds = MINUTE / per_minute
        self._free_at = float("-inf")

    def wait(self, now: float) -> float:
        """Seconds until more may be sent."""
        return max(0.0, self._free_at - now)

    def take(self, now: float, units: float) -> None:
        """So much is sent now."""
        self._free_at = max(self._free_at, now) + units * self._seconds

    def give_back(self, units: float) -> None:
        """It was less by so much; or, if negative, more."""
        self._free_at -= units * self._seconds


class Quota:
    """What may be sent to one upstream.

    Args:
        requests_per_minute, tokens_per_minute: None for no limit.

    Attributes:
        is_set: whether there is a limit, so that it must be told what is `sent`.
        may_hold: whether there is a limit, or the upstream has told one, so that there may be something to `wait` for.
    """

    def __init__(self, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> None:
        self._requests = None if requests_per_minute is None else _Pace(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else _Pace(tokens_per_minute)
        self._output = FIRST_OUTPUT
        self._held_until = float("-inf")
        self.is_set = self.may_hold = requests_per_minute is not None or tokens_per_minute is not None

    def wait(self, now: float) -> float:
        """Seconds until the next request may be sent; 0 for now.

        Args:
            now: monotonic seconds.
        """
        wait = max(0.0, self._held_until - now)
        if self._requests is not None:
            wait = max(wait, self._requests.wait(now))
        if self._tokens is not None:
            wait = max(wait, self._tokens.wait(now))
        return wait

    def sent(self, now: float, size: int) -> float:
        """A request is sent.

        Args:
            now: monotonic seconds.
            size: of its body, in bytes.

        Returns:
            The tokens that it is taken to need.
        """
        if self._requests is not None:
            self._requests.take(now, 1)
        if self._tokens is None:
            return 0.0
        estimate = size / BYTES_A_TOKEN + self._output
        self._tokens.take(now, estimate)
        return estimate

    def answered(self, estimate: float, input_tokens: int, output_tokens: int) -> None:
        """A request was answered, and the answer says what it took.

        Args:
            estimate: what `sent` gave.
            input_tokens, output_tokens: as the upstream counts.
        """
        if self._tokens is not None:
            self._output += SMOOTHING * (output_tokens - self._output)
            self._tokens.give_back(estimate - input_tokens - output_tokens)

    def told(self, now: float, limit: RateLimit) -> None:
        """The upstream said how much of its own quota is left; with nothing left, wait for it."""
        for left, reset in ((limit.requests_left, limit.requests_reset), (limit.tokens_left, limit.tokens_reset)):
            if left is not None and left <= 0 and reset is not None:
                self._held_until = max(self._held_until, now + min(reset, LONGEST_HOLD))
                self.may_hold = True
