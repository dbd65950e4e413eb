"""Making and parting request files."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchery.client.errors import InputError, SettingsError
from batchery.client.limits import ServerLimits, limits_named, server_name_of
from batchery.client.making import Making
from batchery.client.requests_file import make_requests, split_requests
from tests.client.fake_server import requests


def test_a_bad_row_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    path, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    path.write_text("prompt\na\nb,c\n")
    out.write_text("before")
    with pytest.raises(InputError):
        make_requests([str(path)], Making(model="m"), out)
    assert out.read_text() == "before"
    path.write_text("prompt\na\nb\n")
    assert make_requests([str(path)], Making(model="m"), out) == 2
    assert out.read_bytes().count(b"\n") == 2
    with pytest.raises(SettingsError, match="both input and output"):
        make_requests([str(out)], Making(), out)


def test_pieces_together_are_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(25))
    files = split_requests([str(path)], tmp_path / "parts", "in", ServerLimits(requests=10))
    assert [file.requests for file in files] == [10, 10, 5]
    assert b"".join(Path(file.path).read_bytes() for file in files) == requests(25)
    with pytest.raises(SettingsError, match="--overwrite"):
        split_requests([str(path)], tmp_path / "parts", "in", ServerLimits())
    files = split_requests([str(path)], tmp_path / "parts", "in", ServerLimits(), overwrite=True)
    assert [Path(file.path).name for file in files] == ["in-1.jsonl"]
    assert [found.name for found in (tmp_path / "parts").iterdir()] == ["in-1.jsonl"]


def test_pieces_may_not_replace_their_input(tmp_path: Path) -> None:
    path = tmp_path / "in-1.jsonl"
    path.write_bytes(requests(2))
    with pytest.raises(SettingsError, match="both input and output"):
        split_requests([str(path)], tmp_path, "in", ServerLimits(), overwrite=True)


def test_known_servers() -> None:
    assert limits_named("openai").one_model
    assert not limits_named("doubleword").one_url
    assert server_name_of("https://api.openai.com/v1") == "openai"
    assert server_name_of("https://api.doubleword.ai") == "doubleword"
    assert server_name_of("http://127.0.0.1:8000") == "batchery"
    with pytest.raises(SettingsError, match="--server"):
        limits_named("other")
