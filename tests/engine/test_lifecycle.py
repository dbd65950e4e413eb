"""The life of a batch: whatever happens to it in whatever order, it ends once, in the way the contract draws."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchery.engine import lifecycle
from batchery.wire.errors import Conflict

ARROWS = {
    ("validating", "in_progress"),
    ("validating", "finalizing"),
    ("validating", "cancelling"),
    ("in_progress", "finalizing"),
    ("in_progress", "cancelling"),
    ("finalizing", "cancelling"),
    ("finalizing", "completed"),
    ("finalizing", "failed"),
    ("finalizing", "expired"),
    ("cancelling", "cancelled"),
}
STAMPS = (
    "in_progress_at",
    "finalizing_at",
    "cancelling_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelled_at",
)


class LifeOfABatch(RuleBasedStateMachine):
    """A batch as the engine drives it: every change is applied as soon as it is decided."""

    @initialize(total=st.integers(1, 6), window=st.integers(1, 20))
    def create(self, total: int, window: int) -> None:
        self.row: dict[str, Any] = dict.fromkeys(STAMPS) | {"status": "validating", "ending": None}
        self.total = total
        self.completed = self.failed = 0
        self.now = 100
        self.expires_at = 100 + window
        self.cancelled = self.window_ended = self.all_recorded = False
        self.history = ["validating"]
        self.frozen: dict[str, Any] | None = None

    def apply(self, change: dict[str, Any]) -> None:
        before = self.row["status"]
        for name, value in change.items():
            assert name in self.row
            if name in STAMPS:
                assert self.row[name] is None, f"{name} is set a second time"
                assert value == self.now
        self.row |= change
        assert (before, self.row["status"]) in ARROWS
        self.history.append(self.row["status"])
        if lifecycle.is_terminal(self.row["status"]):
            self.frozen = dict(self.row)

    @property
    def status(self) -> str:
        return str(self.row["status"])

    @rule(seconds=st.integers(0, 5))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: self.status == "validating")
    @rule()
    def plan(self) -> None:
        self.apply(lifecycle.planned(self.now))

    # What is in flight is still recorded while a batch is being cancelled or its window has ended.
    @precondition(
        lambda self: (
            self.row["in_progress_at"] is not None
            and not lifecycle.is_terminal(self.status)
            and self.completed + self.failed < self.total
        )
    )
    @rule(data=st.data())
    def record(self, data: st.DataObject) -> None:
        left = self.total - self.completed - self.failed
        good = data.draw(st.integers(0, left))
        bad = data.draw(st.integers(0, left - good))
        self.completed += good
        self.failed += bad
        change = lifecycle.recorded(
            self.status, total=self.total, completed=self.completed, failed=self.failed, now=self.now
        )
        last = self.completed + self.failed == self.total
        assert (change is not None) == (last and self.status == "in_progress")
        if change is not None:
            self.all_recorded = True
            self.apply(change)

    @rule()
    def look_at_the_window(self) -> None:
        change = lifecycle.window_ended(self.status, expires_at=self.expires_at, now=self.now)
        due = self.now >= self.expires_at and self.status in ("validating", "in_progress")
        assert (change is not None) == due
        if change is not None:
            self.window_ended = True
            self.apply(change)

    @rule()
    def cancel(self) -> None:
        if self.status in ("completed", "failed", "expired"):
            with pytest.raises(Conflict) as caught:
                lifecycle.cancelled_by_caller(self.status, now=self.now)
            assert caught.value.headers()["x-should-retry"] == "false"
            return
        change = lifecycle.cancelled_by_caller(self.status, now=self.now)
        assert (change is None) == (self.status in ("cancelling", "cancelled"))
        if change is not None:
            self.cancelled = True
            self.apply(change)

    @rule()
    def finish(self) -> None:
        def finished() -> dict[str, Any]:
            return lifecycle.finished(
                self.status,
                self.row["ending"],
                total=self.total,
                completed=self.completed,
                failed=self.failed,
                now=self.now,
            )

        if self.status in ("finalizing", "cancelling"):
            self.apply(finished())
        else:
            with pytest.raises(ValueError, match="cannot be finished"):
                finished()

    @invariant()
    def one_terminal_stamp(self) -> None:
        if not hasattr(self, "row"):
            return
        stamped = [name for name in lifecycle.TERMINAL_STAMPS if self.row[name] is not None]
        assert stamped == ([f"{self.status}_at"] if lifecycle.is_terminal(self.status) else [])

    @invariant()
    def the_end_never_changes(self) -> None:
        if getattr(self, "frozen", None) is not None:
            assert self.row == self.frozen

    @invariant()
    def it_ends_as_it_must(self) -> None:
        if not hasattr(self, "row") or not lifecycle.is_terminal(self.status):
            return
        if self.cancelled:
            assert self.status == "cancelled"
        elif self.window_ended:
            assert self.status == "expired"
        else:
            assert self.all_recorded
            assert self.status == ("failed" if self.failed == self.total else "completed")

    @invariant()
    def every_status_passed_has_its_stamp(self) -> None:
        if not hasattr(self, "row"):
            return
        for status in self.history[1:]:
            assert self.row[f"{status}_at"] is not None


TestLifeOfABatch = LifeOfABatch.TestCase


@pytest.mark.parametrize(
    ("completed", "failed", "status"), [(0, 3, "failed"), (1, 2, "completed"), (3, 0, "completed")]
)
def test_a_batch_of_which_every_request_failed_has_failed(completed: int, failed: int, status: str) -> None:
    change = lifecycle.finished("finalizing", "completed", total=3, completed=completed, failed=failed, now=9)
    assert change == {"status": status, f"{status}_at": 9}


def test_the_window_matters_more_than_what_failed() -> None:
    change = lifecycle.finished("finalizing", "expired", total=3, completed=0, failed=3, now=9)
    assert change == {"status": "expired", "expired_at": 9}


def test_the_window_ends_at_its_very_second() -> None:
    assert lifecycle.window_ended("in_progress", expires_at=100, now=99.999) is None
    assert lifecycle.window_ended("in_progress", expires_at=100, now=100.0) is not None


@pytest.mark.parametrize("status", lifecycle.TERMINAL)
def test_nothing_is_decided_about_an_ended_batch(status: str) -> None:
    assert lifecycle.recorded(status, total=1, completed=1, failed=0, now=9) is None
    assert lifecycle.window_ended(status, expires_at=0, now=9) is None


@pytest.mark.parametrize(("status", "code"), [("cancelling", "batch_cancelled"), ("finalizing", "batch_expired")])
def test_why_requests_never_ran(status: str, code: str) -> None:
    assert lifecycle.never_ran(status)[0] == code
