"""The result file: whole lines only, whatever comes and wherever it breaks off."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.client.output import LineFile

LINES = st.lists(
    st.sampled_from([b"{}", b'{"a": "\xe2\x80\xa8"}', b'{"long": "' + b"x" * 50 + b'"}', b""]), max_size=12
)


def pieces(body: bytes, cuts: list[int], stop: int | None = None) -> Iterator[bytes]:
    """A body in pieces, breaking off after `stop` bytes if that is given."""
    end = len(body) if stop is None else stop
    places = sorted({min(cut, end) for cut in cuts} | {0, end})
    for start, following in pairwise(places):
        yield body[start:following]
    if stop is not None:
        raise ConnectionResetError


@given(lines=LINES, cuts=st.lists(st.integers(0, 400), max_size=8), stop=st.integers(0, 400), data=st.data())
def test_breaking_off_anywhere_and_going_on_gives_the_whole(
    lines: list[bytes], cuts: list[int], stop: int, data: st.DataObject
) -> None:
    body = b"".join(line + b"\n" for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        file = LineFile(path)
        if stop < len(body):
            with pytest.raises(ConnectionResetError):
                file.append(pieces(body, cuts, stop))
        had = path.read_bytes() if path.exists() else b""
        assert body.startswith(had)
        assert had.count(b"\n") == file.lines
        assert not had or had.endswith(b"\n")
        if data.draw(st.booleans(), "a new process"):
            file.close()
            file = LineFile(path)
        assert file.append(pieces(body, cuts), skip=file.lines) == len(lines)
        file.close()
        assert (path.read_bytes() if path.exists() else b"") == body


def test_a_complete_object_without_a_line_break_is_a_line(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "out")
    assert file.append([b'{"a": 1}\n{"b"', b": 2}"]) == 2
    file.close()
    assert (tmp_path / "out").read_bytes() == b'{"a": 1}\n{"b": 2}\n'


@pytest.mark.parametrize("tail", [b'{"b": ', b"12", b'"x"', b"\xff", b"[" * 100_000])
def test_anything_else_at_the_end_is_taken_back(tmp_path: Path, tail: bytes) -> None:
    file = LineFile(tmp_path / "out")
    assert file.append([b'{"a": 1}\n', tail]) == 1
    assert file.append([b"{}\n"]) == 1
    file.close()
    assert (tmp_path / "out").read_bytes() == b'{"a": 1}\n{}\n'


def test_cut_keeps_the_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"1\n2\n3\n")
    file = LineFile(path)
    file.cut(2)
    assert path.read_bytes() == b"1\n2\n"
    file.append([b"4\n"])
    file.cut(0)
    file.append([b"5\n"])
    file.close()
    assert path.read_bytes() == b"5\n"
    assert file.lines == 1


def test_no_line_no_file(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "out")
    file.append([])
    file.cut(0)
    file.close()
    assert not (tmp_path / "out").exists()
