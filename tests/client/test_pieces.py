"""Splitting inputs: byte ranges between lines, nothing lost, nothing copied."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.client.errors import ResumeError
from batchery.client.inputs import Input, VerifiedFile, check_inputs
from batchery.client.pieces import split_inputs
from tests.client.fake_server import requests


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Input:
    path = tmp_path_factory.mktemp("pieces") / "in.jsonl"
    lines = requests(40).split(b"\n")
    path.write_bytes(b"\n\r\n".join(lines[:20]) + b"\n" + b"\n".join(lines[20:-1]))
    return check_inputs([path])[0]


@given(max_bytes=st.integers(1, 8000), max_requests=st.integers(1, 60))
def test_pieces_are_the_file_cut_between_lines(source: Input, max_bytes: int, max_requests: int) -> None:
    content = Path(source.path).read_bytes()
    pieces = split_inputs([source], max_bytes=max_bytes, max_requests=max_requests)
    assert sum(piece.size for piece in pieces) == len(content)
    assert sum(piece.requests for piece in pieces) == 40
    end = 0
    for piece in pieces:
        assert piece.start == end
        end += piece.size
        part = content[piece.start : end]
        assert piece.sha256 == hashlib.sha256(part).hexdigest()
        found = [line for line in part.split(b"\n") if line.strip()]
        assert len(found) == piece.requests <= max_requests
        assert piece.requests == 1 or sum(map(len, found)) <= max_bytes
        assert end == len(content) or part.endswith(b"\n")
        with VerifiedFile(piece) as file:
            assert b"".join(iter(lambda: file.read(1000), b"")) == part


def test_a_file_within_the_limits_is_its_only_piece(source: Input) -> None:
    assert split_inputs([source, source]) == [source, source]


def test_a_file_changed_since_its_check_is_not_split(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(4))
    (checked,) = check_inputs([path])
    path.write_bytes(requests(4).replace(b"Say 3", b"Say 4"))
    with pytest.raises(ResumeError, match="changed after it was checked"):
        split_inputs([checked], max_requests=2)
