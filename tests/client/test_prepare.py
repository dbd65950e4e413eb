"""Inputs made ready to be sent."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest

from batchery.client import prepare
from batchery.client.errors import InputError, ResumeError
from batchery.client.inputs import Input
from batchery.client.limits import ServerLimits, limits_named
from batchery.client.making import Making
from batchery.client.numbered_files import NumberedFiles
from batchery.client.prepare import fingerprints, prepare_inputs
from tests.client.fake_server import requests

CLASSIFY = Making(model="m", template="Classify: {{text}}")


def table(rows: int) -> str:
    return "text\n" + "".join(f"row {number}\n" for number in range(rows))


def test_finished_requests_are_used_where_they_are(tmp_path: Path) -> None:
    path, folder = tmp_path / "in.jsonl", tmp_path / "job"
    path.write_bytes(requests(3))
    prepared = prepare_inputs([str(path)], Making(), folder)
    (file,) = prepared.files
    assert (file.path, file.requests, file.size) == (str(path), 3, len(requests(3)))
    assert file.sha256 == hashlib.sha256(requests(3)).hexdigest() == prepared.sources[0].sha256
    assert not folder.exists()
    assert prepared.sources == fingerprints([str(path)], Making())


def test_rows_are_written_in_files_within_the_limits(tmp_path: Path) -> None:
    path, folder = tmp_path / "in.csv", tmp_path / "job"
    path.write_text(table(25))
    prepared = prepare_inputs([str(path)], CLASSIFY, folder, limits=ServerLimits(requests=10))
    assert [(Path(file.path).name, file.requests) for file in prepared.files] == [
        ("requests-1.jsonl", 10),
        ("requests-2.jsonl", 10),
        ("requests-3.jsonl", 5),
    ]
    assert sorted(found.name for found in folder.iterdir()) == [Path(file.path).name for file in prepared.files]
    lines = [line for file in prepared.files for line in Path(file.path).read_bytes().splitlines()]
    assert [json.loads(line)["custom_id"] for line in lines] == [f"row-{number}" for number in range(1, 26)]
    for file in prepared.files:
        content = Path(file.path).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (prepared.rows, prepared.size) == (25, prepared.groups[0].size)
    assert prepared.sources == fingerprints([str(path)], CLASSIFY)


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl"])
def test_an_input_that_is_still_being_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    row = "row\n" if name == "in.csv" else '{"text": "row"}\n'
    path.write_text("text\n" + row if name == "in.csv" else row)

    class Growing(NumberedFiles):
        def finish(self) -> list[Input]:
            with path.open("a") as file:
                file.write(row)
            return super().finish()

    monkeypatch.setattr(prepare, "NumberedFiles", Growing)
    with pytest.raises(ResumeError, match="changed while it was read"):
        prepare_inputs([str(path)], CLASSIFY, tmp_path / "job")


def test_size_parts_files_too(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(table(10))
    prepared = prepare_inputs([str(path)], CLASSIFY, tmp_path / "job", limits=ServerLimits(file_bytes=400))
    assert all(file.size <= 400 for file in prepared.files)
    assert sum(file.requests for file in prepared.files) == 10


def test_a_server_with_one_model_to_a_file_gets_files_of_one_model(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text,model\na,x\nb,y\nc,x\n")
    making = Making(model="{{model}}", template="{{text}}")
    assert len(prepare_inputs([str(path)], making, tmp_path / "one").files) == 1
    parted = prepare_inputs([str(path)], making, tmp_path / "two", limits=limits_named("openai"))
    assert [file.requests for file in parted.files] == [2, 1]
    assert [(group.model, group.requests) for group in parted.groups] == [("x", 2), ("y", 1)]


def test_nothing_is_written_when_a_row_is_bad(tmp_path: Path) -> None:
    path, folder = tmp_path / "in.csv", tmp_path / "job"
    path.write_text(table(5) + "a,b\nc,d\n")
    with pytest.raises(InputError) as caught:
        prepare_inputs([str(path)], CLASSIFY, folder)
    assert caught.value.count == 2
    assert [problem.line for problem in caught.value.problems] == [7, 8]
    assert not folder.exists()


def test_problems_are_counted_beyond_those_that_are_told(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(requests(1) * 1_500 + b"x\n" * 600)
    with pytest.raises(InputError) as caught:
        prepare_inputs([str(path)], Making(), None)
    assert (caught.value.count, len(caught.value.problems)) == (2_099, 1_000)


def test_repeated_bodies_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text\na\nb\na\na\n")
    assert prepare_inputs([str(path)], CLASSIFY, None).repeats == 2


def test_stdin_is_kept_and_may_not_change(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    first = prepare_inputs(["-"], CLASSIFY, folder, stdin=io.BytesIO(table(3).encode()))
    assert first.sources[0].path == "-"
    for again in (None, io.BytesIO(table(3).encode()), io.BytesIO()):
        assert prepare_inputs(["-"], CLASSIFY, folder, stdin=again) == first
    with pytest.raises(ResumeError):
        prepare_inputs(["-"], CLASSIFY, folder, stdin=io.BytesIO(table(4).encode()))
    assert prepare_inputs(["-"], CLASSIFY, folder, stdin=None) == first


def test_finished_lines_from_stdin(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    prepared = prepare_inputs(["-"], Making(), folder, stdin=io.BytesIO(requests(2)))
    assert Path(prepared.files[0].path).read_bytes() == requests(2)
