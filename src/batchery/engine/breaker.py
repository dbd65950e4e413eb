"""The breaker: fails requests at once that can only fail, instead of burning their window.

Two faults do not mend themselves. An upstream that gives the same permanent answer (no such model, a wrong key) to many
requests of one kind (a model and a url) in a row, and a good one to none, will give it to the rest too. And a server to
which there has been no connection for a long time is gone. The reason is the upstream's own, and stays on the batch.

What was seen counts for a while only: then requests are sent again, and one bad answer is enough to fail the rest. So a
batch that is run again after the fault was mended is not failed for what was.

Pure: the clock is an argument.
"""

from __future__ import annotations

import msgspec

from batchery.upstreams.base import Answer, Fault
from batchery.wire.results import Failure, failure_of

ROW = 20
"""The same permanent answers in a row, to one kind of request, that trip it."""

FRESH = 15.0
"""Seconds for which they count."""

GONE_AFTER = 3_600.0
"""Seconds without any connection after which a server is gone: longer than the restart of a large model takes."""

FRESH_UNREACHABLE = 6.0
"""Seconds for which a failed connection counts; a server that is down is asked more often (`health.LONGEST_PAUSE`)."""

MAX_KINDS = 10_000

_PERMANENT = frozenset((401, 402, 403, 404, 405, 410))
"""Statuses that speak of the upstream, the key or the model, and not of one request; 400 and 422 speak of that."""

_NO_MODEL = frozenset(("model_not_found", "invalid_model", "unknown_model", "model_not_available"))
"""Codes of a 400 that say the same as 404."""


Kind = tuple[str, str]
"""The model that a request names, and the url of its line."""


def is_permanent(outcome: Answer | Fault) -> bool:
    """Whether an outcome speaks of the upstream, the key or the model: another upstream may say something else."""
    if isinstance(outcome, Fault):
        return False
    if outcome.status == 400:
        return failure_of(outcome.status, outcome.body).code in _NO_MODEL
    return outcome.status in _PERMANENT


def refuses_model(outcome: Answer | Fault, model: str) -> bool:
    """Whether an outcome says that the upstream does not serve this model: by its code, or by a 404 that names it."""
    if isinstance(outcome, Fault) or outcome.status not in (400, 404):
        return False
    return _is_of_model(outcome.status, failure_of(outcome.status, outcome.body), model)


def _is_of_model(status: int, failure: Failure, model: str) -> bool:
    return failure.code in _NO_MODEL or (status == 404 and model in failure.message)


class _Row(msgspec.Struct):
    """The same answers in a row."""

    status: int
    failure: Failure
    count: int
    seen_at: float


class Breaker:
    """For one upstream.

    Args:
        gone_after: seconds without a connection after which the server is gone.

    Attributes:
        watching: whether anything has failed that may be permanent; if not, there is no need to ask.
    """

    def __init__(self, gone_after: float = GONE_AFTER) -> None:
        self.watching = False
        self._gone_after = gone_after
        self._rows: dict[Kind, _Row] = {}
        self._unreachable_since: float | None = None
        self._unreachable_at = float("-inf")
        self._unreachable_message = ""

    def succeeded(self, kind: Kind) -> None:
        """A request of this kind was answered well."""
        if self._rows:
            self._rows.pop(kind, None)
        self._unreachable_since = None
        self.watching = bool(self._rows)

    def failed(self, kind: Kind, outcome: Answer | Fault, now: float) -> None:
        """A request of this kind was not.

        Args:
            kind: the request's.
            outcome: of the attempt.
            now: monotonic seconds.
        """
        self._note(kind, outcome, now)
        self.watching = bool(self._rows) or self._unreachable_since is not None

    def _note(self, kind: Kind, outcome: Answer | Fault, now: float) -> None:
        if isinstance(outcome, Fault):
            if outcome.kind == "unreachable":
                if self._unreachable_since is None:
                    self._unreachable_since = now
                self._unreachable_at, self._unreachable_message = now, outcome.message
            else:
                self._unreachable_since = None
            return
        self._unreachable_since = None
        if outcome.status not in _PERMANENT and outcome.status != 400:
            return
        failure = failure_of(outcome.status, outcome.body)
        if outcome.status == 400 and failure.code not in _NO_MODEL:
            self._rows.pop(kind, None)
            return
        row = self._rows.get(kind)
        if row is None or (row.status, row.failure.code) != (outcome.status, failure.code):
            if len(self._rows) >= MAX_KINDS:
                self._rows.clear()
            row = self._rows[kind] = _Row(outcome.status, failure, 0, now)
        row.count += 1
        row.seen_at = now

    def verdict(self, kind: Kind, now: float) -> Failure | None:
        """Why a request of this kind need not be sent; None if it is to be.

        Args:
            kind: the request's.
            now: monotonic seconds.
        """
        since = self._unreachable_since
        if since is not None and now - since >= self._gone_after and now - self._unreachable_at < FRESH_UNREACHABLE:
            return Failure(
                "upstream_unreachable",
                f"There has been no connection to the upstream for {(now - since) / 60:.0f} minutes. "
                f"{self._unreachable_message}",
            )
        row = self._rows.get(kind)
        if row is None or row.count < ROW:
            return None
        if now - row.seen_at > FRESH:
            row.count = ROW - 1
            return None
        return Failure(
            row.failure.code,
            f"The upstream gave {ROW} requests for the model {kind[0]!r} at {kind[1]} in a row the same answer, HTTP "
            f"status {row.status}: {row.failure.message} The others were not sent.",
        )

    def refuses_model(self, kind: Kind) -> bool:
        """Whether requests of this kind fail because the upstream does not serve the model."""
        row = self._rows.get(kind)
        return row is not None and _is_of_model(row.status, row.failure, kind[0])

    @property
    def tripped(self) -> int:
        """How many kinds of requests are failed without being sent."""
        return sum(row.count >= ROW for row in self._rows.values())
