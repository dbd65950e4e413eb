"""Progress in words: few lines in a log, and none without news."""

from __future__ import annotations

import io

import pytest

from batchery.client.inputs import megabytes
from batchery.client.job import Progress
from batchery.client.progress import Lines, Nothing, Speed, describe, display_for, duration


def test_a_log_gets_a_line_for_each_phase_and_every_few_seconds_if_something_moved() -> None:
    clock = [0.0]
    stream = io.StringIO()
    lines = Lines(stream, lambda: clock[0])
    running = Progress("in_progress", 100)
    for now, progress in (
        (0.0, Progress("uploading", 100, sent=0, size=2_000_000)),
        (0.5, Progress("uploading", 100, sent=1_000_000, size=2_000_000)),
        (1.0, running),
        (2.0, Progress("in_progress", 100, completed=10)),
        (7.0, Progress("in_progress", 100, completed=20, failed=4, received=20)),
        (60.0, Progress("in_progress", 100, completed=20, failed=4, received=20)),
        (61.0, Progress("completed", 100, completed=96, failed=4, received=96, finished=True)),
    ):
        clock[0] = now
        lines.update(progress)
    assert stream.getvalue().splitlines() == [
        "uploading: 0 bytes of 2.0 MB",
        "in_progress: 0/100 done",
        "in_progress: 24/100 done, 4 failed, 20 received, 4.0/s, about 19 s left",
        "completed: 100/100 done, 4 failed, 96 received",
    ]


def test_speed_is_that_of_the_last_half_minute() -> None:
    speed = Speed()
    assert speed.update(0, 0) is None
    assert speed.update(10, 100) == 10
    assert speed.update(40, 100 + 30 * 2) == 2
    assert speed.update(100, 160) is None


def test_words() -> None:
    assert describe(Progress("in_progress", 10, completed=5), 0.5) == "5/10 done, 0.5/s, about 10 s left"
    assert describe(Progress("in_progress", 10), None) == "0/10 done"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (12.4, "12 s"), (200, "3 min 20 s"), (3600 + 300, "1 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(12, "12 bytes"), (45_380, "45 kB"), (209_715_200, "209.7 MB")])
def test_sizes(size: int, text: str) -> None:
    assert megabytes(size) == text


def test_the_display_fits_the_stream() -> None:
    assert isinstance(display_for(io.StringIO(), quiet=False), Lines)
    assert isinstance(display_for(io.StringIO(), quiet=True), Nothing)
