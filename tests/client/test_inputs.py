"""Checking inputs before anything is sent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from batchery.client.errors import InputError, SettingsError
from batchery.client.inputs import check_inputs
from batchery.wire.lines import Limits
from tests.client.fake_server import requests


def test_a_good_file_has_a_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(3))
    (found,) = check_inputs([path])
    assert (found.requests, found.size, found.url) == (3, len(requests(3)), "/v1/chat/completions")
    assert found.sha256 == hashlib.sha256(requests(3)).hexdigest()


def test_every_problem_of_every_file_is_told_with_its_line(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b"nonsense\n" + requests(2) + b'{"custom_id": 1}\n' + requests(1))
    second.write_bytes(b"\xff\n" + requests(2, "b"))
    with pytest.raises(InputError) as caught:
        check_inputs([first, second])
    assert [(Path(p.path).name, p.line, p.code) for p in caught.value.problems] == [
        ("a.jsonl", 1, "invalid_json_line"),
        ("a.jsonl", 4, "missing_required_parameter"),
        ("a.jsonl", 5, "duplicate_custom_id"),
        ("b.jsonl", 1, "invalid_utf8"),
    ]
    assert caught.value.count == 4


def test_a_custom_id_may_not_come_back_in_another_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(requests(3))
    second.write_bytes(b"\n" + requests(1, "b") + requests(1))
    with pytest.raises(InputError) as caught:
        check_inputs([first, second])
    (problem,) = caught.value.problems
    assert (problem.path, problem.line, problem.code) == (str(second), 3, "duplicate_custom_id")
    assert f"already used in {first} on line 1" in problem.message


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(3))
    with pytest.raises(InputError) as caught:
        check_inputs([path], Limits(file_bytes=100, requests=2))
    assert [p.code for p in caught.value.problems] == ["file_too_large", "too_many_requests_in_file"]


def test_empty_missing_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(InputError) as caught:
        check_inputs([tmp_path / "empty"])
    assert [p.code for p in caught.value.problems] == ["empty_file"]
    with pytest.raises(SettingsError, match="does not exist"):
        check_inputs([tmp_path / "none"])
    with pytest.raises(SettingsError, match="is a folder"):
        check_inputs([tmp_path])
