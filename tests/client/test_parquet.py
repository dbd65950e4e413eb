"""Parquet as input."""

from __future__ import annotations

import datetime
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from batchery.client.errors import InputProblem, SettingsError
from batchery.client.making import Making
from batchery.client.rows import Row, read_rows

MAKING = Making(model="m", template="{{text}}", id_column="id")


def test_rows_of_all_kinds_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    table = pyarrow.table(
        {
            "id": list(range(1_000)),
            "text": [f"row {number}" for number in range(1_000)],
            "day": [datetime.date(2026, 1, 2)] * 1_000,
            "price": [Decimal("1.50")] * 1_000,
            "raw": [b"\x00"] * 1_000,
            "nested": [{"a": [1]}] * 1_000,
            "none": [None] * 1_000,
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=300)
    rows = [row for row in read_rows([str(path)], MAKING) if isinstance(row, Row)]
    assert [row.custom_id for row in rows] == [str(number) for number in range(1_000)]
    assert rows[7].data == {
        "id": 7,
        "text": "row 7",
        "day": "2026-01-02",
        "price": "1.50",
        "raw": "AA==",
        "nested": {"a": [1]},
        "none": None,
    }


def test_what_is_no_parquet_is_told(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1 and nothing more")
    (problem,) = read_rows([str(path)], MAKING)
    assert isinstance(problem, InputProblem)
    assert problem.code == "invalid_parquet"


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingsError, match=r"batchery\[parquet\]"):
        list(read_rows([str(path)], MAKING))
