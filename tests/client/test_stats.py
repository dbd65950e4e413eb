"""Result files in numbers."""

from __future__ import annotations

from pathlib import Path

from batchery.client.stats import result_stats
from batchery.wire.results import Usage
from tests.client.results import answer, failure


def test_what_is_counted(tmp_path: Path) -> None:
    path, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    path.write_text("".join(answer(f"a{number}", latency_ms=number) for number in range(100)))
    errors.write_text(failure("b") + failure("c") + failure("d", None, "batch_expired"))
    stats = result_stats([path, errors])
    assert (stats.rows, stats.ok, stats.failed) == (103, 100, 3)
    assert stats.statuses == {"200": 100, "500": 2, "none": 1}
    assert stats.reasons == {"500 server_error: broken": 2, "batch_expired: broken": 1}
    assert (stats.models, stats.finish_reasons) == ({"m": 100}, {"stop": 100})
    assert (stats.usage, stats.counted) == (Usage(300, 100, 200, 0), 100)
    assert (stats.timed, stats.latency(0.5), stats.latency(1)) == (100, 50, 99)


def test_no_latency_where_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(answer("a"))
    assert result_stats([path]).latency(0.5) is None
