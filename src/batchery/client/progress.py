"""Showing where a job is: a bar on a terminal, and plain lines, few and only when something moved, in a log.

Everything goes to stderr; stdout belongs to data.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from batchery.client.inputs import megabytes
from batchery.client.job import Progress
from batchery.client.objects import Deduplicated

LINE_EVERY = 5.0  # seconds between two lines in a log while nothing but the counts changes
RATE_OVER = 30.0  # seconds that the shown rate is a mean of


class Display(Protocol):
    """Something that shows a job's progress."""

    def update(self, progress: Progress) -> None:
        """Show where the job is now."""

    def close(self) -> None:
        """Leave the last state standing, and give the terminal back."""


def display_for(stream: TextIO, *, quiet: bool) -> Display:
    """The display that fits.

    Args:
        stream: stderr.
        quiet: show nothing.
    """
    if quiet:
        return Nothing()
    return Terminal(stream) if stream.isatty() else Lines(stream)


class Speed:
    """Rows a second over the last half minute."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, now: float, done: int) -> float | None:
        """Take note of a count.

        Args:
            now: seconds on any steady clock.
            done: rows done.

        Returns:
            Rows a second; None until something moved.
        """
        samples = self._samples
        if samples and done < samples[-1][1]:
            samples.clear()
        samples.append((now, done))
        while len(samples) > 2 and samples[0][0] < now - RATE_OVER:
            samples.popleft()
        span = now - samples[0][0]
        moved = done - samples[0][1]
        return moved / span if span > 0 and moved > 0 else None


def describe(progress: Progress, rate: float | None) -> str:
    """Progress in words: what is done, how fast, and how long it may still take."""
    if progress.phase == "uploading":
        return f"{megabytes(progress.sent)} of {megabytes(progress.size)}"
    done = progress.completed + progress.failed
    words = [f"{done}/{progress.rows} done"]
    if progress.failed:
        words.append(f"{progress.failed} failed")
    if progress.received > 0:
        words.append(f"{progress.received} received")
    if progress.cost is not None:
        words.append(f"${progress.cost:.2f}")
    if rate is not None and not progress.finished:
        words.append(f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
        if done < progress.rows:
            words.append(f"about {duration((progress.rows - done) / rate)} left")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """A time as people read it: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def saving(saved: Deduplicated | None) -> str | None:
    """What was saved by sending identical requests once, in words; None if nothing was."""
    if saved is None or not saved.requests:
        return None
    return (
        f"{saved.requests} request{'s' * (saved.requests > 1)} answered by another's answer, "
        f"{saved.input_tokens} input and {saved.output_tokens} output tokens"
    )


class Nothing:
    """Shows nothing."""

    def update(self, progress: Progress) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """Plain lines: one when the phase changes, and every few seconds one while the counts move.

    Args:
        stream: where they go.
        clock: seconds on any steady clock.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._speed = Speed()
        self._phase = ""
        self._shown: Progress | None = None
        self._shown_at = 0.0

    def update(self, progress: Progress) -> None:
        """Write a line, if there is reason to."""
        now = self._clock()
        rate = None
        if progress.phase != "uploading":
            rate = self._speed.update(now, progress.completed + progress.failed)
        new_phase = progress.phase != self._phase
        moved = progress != self._shown and now - self._shown_at >= LINE_EVERY
        if new_phase or moved:
            self._phase, self._shown, self._shown_at = progress.phase, progress, now
            self._stream.write(f"{progress.phase}: {describe(progress, rate)}\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing is open."""


class Terminal:
    """A bar that is redrawn in place.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._speed = Speed()
        self._bar = Bar(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[words]}"),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("starting", total=None, words="")
        self._bar.start()

    def update(self, progress: Progress) -> None:
        """Redraw."""
        rate = None
        if progress.phase == "uploading":
            total, done = progress.size, progress.sent
        else:
            total, done = progress.rows, progress.completed + progress.failed
            rate = self._speed.update(time.monotonic(), done)
        words = describe(progress, rate)
        self._bar.update(self._task, description=progress.phase, total=total, completed=done, words=words)

    def close(self) -> None:
        """Draw once more, and stop."""
        self._bar.stop()
