"""The states of a batch, as pure functions: each says which columns change, or that nothing may.

    validating ── planned ──▶ in_progress ── every request recorded ──▶ finalizing ──▶ completed | failed
        │                          │
        ├────── window ended ──────┴──▶ finalizing (ending: expired) ──▶ expired
        │                          │
        └── cancel (also while finalizing) ──▶ cancelling ──▶ cancelled

A file with bad lines gives a batch that is `failed` from the start. Exactly one terminal stamp is ever set, and a
terminal status never changes, but that a retry takes the batch back to `validating`. Callers apply a change only if the
status is still the one it was decided on.
"""

from __future__ import annotations

from typing import Any

from batchery.wire.errors import BadRequest, Conflict

TERMINAL = ("completed", "failed", "expired", "cancelled")
TERMINAL_STAMPS = ("completed_at", "failed_at", "expired_at", "cancelled_at")

Change = dict[str, Any]


def is_terminal(status: str) -> bool:
    """Whether a batch with this status has ended."""
    return status in TERMINAL


def planned(now: int) -> Change:
    """The plan is stored: a `validating` batch begins to run.

    Args:
        now: Unix seconds, as everywhere here.
    """
    return {"status": "in_progress", "in_progress_at": now}


def recorded(status: str, *, total: int, completed: int, failed: int, now: int) -> Change | None:
    """Results were recorded: the last one ends the run.

    Args:
        status: the batch's own.
        total: its requests.
        completed: those with a good answer, these results included.
        failed: those without, likewise.
    """
    if status == "in_progress" and completed + failed >= total:
        return {"status": "finalizing", "finalizing_at": now, "ending": "completed"}
    return None


def window_ended(status: str, *, expires_at: int, now: float) -> Change | None:
    """The window has passed: nothing new is sent, and what never ran will be said so."""
    if status in ("validating", "in_progress") and now >= expires_at:
        return {"status": "finalizing", "finalizing_at": int(now), "ending": "expired"}
    return None


def cancelled_by_caller(status: str, *, now: int) -> Change | None:
    """Somebody asks to cancel: None when that was done before.

    Raises:
        Conflict: the batch has ended in another way.
    """
    if status in ("cancelling", "cancelled"):
        return None
    if is_terminal(status):
        raise Conflict(f"Cannot cancel a batch with status '{status}'.", code="batch_not_cancellable")
    return {"status": "cancelling", "cancelling_at": now}


def retried(status: str, *, total: int, completed: int, invalid: int, window: int, now: int) -> Change:
    """Somebody asks to run again what has no good answer: under the same id, with a fresh window.

    Args:
        status: the batch's own.
        total: its requests.
        completed: those with a good answer.
        invalid: those that are bad lines, which never ran and never will.
        window: its completion window, in seconds.

    Raises:
        Conflict: the batch has not ended.
        BadRequest: there is nothing to run again.
    """
    if not is_terminal(status):
        raise Conflict(
            f"Cannot retry a batch with status '{status}'; wait until it has ended, or cancel it first.",
            code="batch_not_retryable",
        )
    if completed + invalid >= total:
        raise BadRequest(
            "There is nothing to retry: no request of this batch that could run has failed, expired or been cancelled.",
            code="nothing_to_retry",
        )
    return {
        "status": "validating",
        "expires_at": now + window,
        "in_progress_at": None,
        "finalizing_at": None,
        "ending": None,
        "errors": None,
        "cancelling_at": None,
        **dict.fromkeys(TERMINAL_STAMPS),
    }


def finished(status: str, ending: str | None, *, total: int, completed: int, failed: int, now: int) -> Change:
    """The files are complete: how the batch ends.

    Args:
        status: `finalizing` or `cancelling`.
        ending: what `recorded` or `window_ended` decided; of no matter when cancelling.
        total, completed, failed: the final counts; a batch of which every request failed has failed.

    Raises:
        ValueError: the batch is not about to end.
    """
    if status == "cancelling":
        return {"status": "cancelled", "cancelled_at": now}
    if status != "finalizing":
        raise ValueError(f"a batch that is {status} cannot be finished")
    if ending == "expired":
        return {"status": "expired", "expired_at": now}
    if completed == 0 and failed >= total:
        return {"status": "failed", "failed_at": now}
    return {"status": "completed", "completed_at": now}


def never_ran(status: str) -> tuple[str, str]:
    """The code and the message for the requests of an ending batch that never ran."""
    if status == "cancelling":
        return "batch_cancelled", "This request was not run: its batch was cancelled."
    return "batch_expired", "This request was not run: its batch's completion window ended first."
