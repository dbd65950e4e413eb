"""Some rows of an input."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from batchery.client.errors import InputError
from batchery.client.sample import sample_rows
from batchery.client.sources import resolve_sources


def sample(path: Path, rows: int, *, first: bool = False, seed: int = 0) -> list[bytes]:
    (source,) = resolve_sources([str(path)])
    return list(sample_rows(source, rows, first=first, seed=seed))


def test_jsonl_lines_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [b'{"n":  %d}\n' % number for number in range(100)]
    path.write_bytes(b"\n".join(lines))
    assert sample(path, 3, first=True) == lines[:3]
    chosen = sample(path, 10)
    assert chosen == sorted(chosen, key=lines.index)
    assert len(set(chosen)) == 10
    assert sample(path, 10) == chosen
    assert sample(path, 10, seed=1) != chosen
    assert sample(path, 1_000) == lines


def test_every_row_is_as_likely_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b"%d\n" % number for number in range(10)))
    drawn = [int(line) for seed in range(400) for line in sample(path, 2, seed=seed)]
    assert all(45 < drawn.count(number) < 120 for number in range(10))  # 80 each, give or take


def test_csv_keeps_its_header_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('a;b\n1;"x\ny, z"\n2;w\n')
    assert b"".join(sample(path, 1, first=True)) == b'a,b\n1,"x\ny, z"\n'
    path.write_text("a,b\n1\n")
    with pytest.raises(InputError):
        sample(path, 1)


def test_parquet_becomes_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), path)
    assert sample(path, 5) == [b'{"a":1}\n', b'{"a":2}\n']
