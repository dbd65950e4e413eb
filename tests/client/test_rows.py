"""Rows of inputs becoming requests."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from batchery.client.errors import InputProblem, SettingsError
from batchery.client.making import Making, parse_setting
from batchery.client.rows import Row, read_rows
from batchery.wire.lines import Limits

MODEL = Making(model="m")
CLASSIFY = Making(model="m", template="Classify: {{text}}")


def read(inputs: list[Path] | list[str], making: Making, **options: Any) -> list[Row | InputProblem]:
    return list(read_rows([str(name) for name in inputs], making, **options))


def bodies(rows: list[Row | InputProblem]) -> list[Any]:
    assert all(isinstance(row, Row) for row in rows), rows
    return [json.loads(row.line)["body"] for row in rows if isinstance(row, Row)]


def problems(rows: list[Row | InputProblem]) -> list[tuple[int | None, str]]:
    return [(row.line, row.code) for row in rows if isinstance(row, InputProblem)]


def messages(rows: list[Row | InputProblem]) -> str:
    return "\n".join(row.message for row in rows if isinstance(row, InputProblem))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_bare_jsonl_has_prompts_or_messages_and_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "in.jsonl",
        '{"prompt": "a", "topic": "t"}\n\n{"messages": [{"role": "user", "content": "b"}], "custom_id": "own"}\n',
    )
    first, second = read([path], Making(model="m", system="Be brief."))
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (first.number, first.custom_id, first.data) == (1, "row-1", {"prompt": "a", "topic": "t"})
    assert (second.number, second.custom_id) == (3, "own")
    assert json.loads(first.line) == {
        "custom_id": "row-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
        },
    }
    assert json.loads(second.line)["body"]["messages"][1] == {"role": "user", "content": "b"}


def test_a_finished_request_stays_byte_for_byte(tmp_path: Path) -> None:
    line = '{"custom_id":"a",  "method":"POST","url":"/v1/embeddings","body":{"model":"e","input":"x"}}'
    path = write(tmp_path, "in.jsonl", "\ufeff" + line + "\r\n")
    (row,) = read([path], Making())
    assert isinstance(row, Row)
    assert (row.line, row.data, row.changed) == (line.encode() + b"\n", None, False)


def test_a_finished_request_takes_model_settings_and_limits(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "in.jsonl",
        '{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"messages":[],"max_tokens":9}}\n',
    )
    making = Making(model="other", max_tokens=5, settings=(("body.temperature", 0), ("body.a.b", "x")))
    assert bodies(read([path], making)) == [
        {"messages": [], "model": "other", "max_completion_tokens": 5, "temperature": 0, "a": {"b": "x"}}
    ]


@pytest.mark.parametrize("making", [CLASSIFY, Making(system="x"), Making(image_column="i")])
def test_what_is_for_rows_is_refused_for_finished_requests(tmp_path: Path, making: Making) -> None:
    line = '{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{"model":"e","input":"x"}}'
    rows = read([write(tmp_path, "in.jsonl", line)], making)
    assert problems(rows) == [(1, "invalid_value")]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 7}),
        ("/v1/responses", {"model": "m", "input": "a", "max_output_tokens": 7}),
        ("/v1/messages", {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 7}),
    ],
)
def test_other_endpoints(tmp_path: Path, endpoint: str, body: dict[str, Any]) -> None:
    path = write(tmp_path, "in.jsonl", '{"prompt": "a"}')
    assert bodies(read([path], Making(model="m", endpoint=endpoint, max_tokens=7))) == [body]


def test_csv_as_excel_writes_it(tmp_path: Path) -> None:
    path = write(tmp_path, "in.csv", '\ufeffid;text\r\na;"x\r\n""y"""\r\n\r\nb;z\r\n;\r\n')
    rows = read([path], Making(model="m", template="T {{ text }}", id_column="id"))
    assert [body["messages"][0]["content"] for body in bodies(rows)] == ['T x\r\n"y"', "T z"]
    assert [row.custom_id for row in rows if isinstance(row, Row)] == ["a", "b"]
    assert [row.number for row in rows if isinstance(row, Row)] == [1, 2]


def test_tsv_and_unnamed_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "in.tsv", "\ttext\n0\ta, b\n")
    (row,) = read([path], CLASSIFY)
    assert isinstance(row, Row)
    assert row.data == {"column_1": "0", "text": "a, b"}


def test_what_is_wrong_with_a_csv_is_told_with_its_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, "in.csv", b'text,n\n"a\nb",1\nshort\n\xff,2\n"x"y,3\nfine,4\n"never closed,5\n')
    rows = read([path], CLASSIFY)
    assert problems(rows) == [
        (4, "wrong_column_count"),
        (5, "invalid_utf8"),
        (6, "invalid_csv"),
        (8, "invalid_csv"),
    ]
    assert "Line 4 (row 2) has 1 column, the header has 2" in messages(rows)


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b"", "empty_file", "empty"),
        (b"a,b\n", "empty_file", "no rows"),
        (b"a,b,a\n1,2,3\n", "invalid_csv", "'a' more than once"),
        ("a,text\n1,2\n".encode("utf-16"), "invalid_utf8", "UTF-16"),
        (b"a,text\r1,2\r", "invalid_csv", "tr '\\r' '\\n'"),
        (b'"a","text"\r"1","2"\r', "invalid_csv", "tr '\\r' '\\n'"),
        (b"PK\x03\x04 a workbook", "invalid_csv", "save the sheet as CSV"),
        (gzip.compress(b"a,text\n1,2\n", mtime=0), "invalid_csv", "gzip -d"),
        (b"n,m\n1,2\n", "missing_column", "names the column 'text'. The columns are: 'n', 'm'."),
    ],
)
def test_a_csv_that_is_wrong_as_a_whole_is_told_once(tmp_path: Path, content: bytes, code: str, text: str) -> None:
    rows = read([write(tmp_path, "in.csv", content)], CLASSIFY)
    assert [found for _, found in problems(rows)] == [code]
    assert text in messages(rows)


def test_a_template_in_single_braces_is_told_once(tmp_path: Path) -> None:
    path = write(tmp_path, "in.csv", "text\na\nb\n")
    rows = read([path], Making(model="m", template="Classify: {text}"))
    assert [code for _, code in problems(rows)] == ["missing_column"]
    assert "has {text}; write {{text}}. The columns are" in messages(rows)
    assert len(bodies(read([path], Making(model="m", template="As {json}: {{text}}")))) == 2
    assert len(bodies(read([path], Making(model="m", template="Say something as {json}")))) == 2


def test_a_field_may_be_huge_but_not_endless(tmp_path: Path) -> None:
    path = write(tmp_path, "in.csv", "text\n" + "x" * 300_000 + "\n")
    assert len(bodies(read([path], CLASSIFY))[0]["messages"][0]["content"]) > 300_000
    rows = read([path], CLASSIFY, limits=Limits(line_bytes=200_000))
    assert problems(rows) == [(2, "invalid_csv")]


def test_the_line_limit_is_that_of_the_finished_request(tmp_path: Path) -> None:
    path = write(tmp_path, "in.csv", "text\n" + "x" * 990 + "\n" + "y" * 10 + "\n")
    assert problems(read([path], CLASSIFY, limits=Limits(line_bytes=1000))) == [(2, "line_too_large")]


def test_custom_ids_are_unique_over_all_inputs(tmp_path: Path) -> None:
    one = write(tmp_path, "a.csv", "text\na\nb\n")
    two = write(tmp_path, "b.jsonl", '{"text": "c"}\n{"text": "d", "custom_id": "row-2"}\n')
    rows = read([one, two], CLASSIFY)
    assert [row.custom_id for row in rows if isinstance(row, Row)] == ["row-1", "row-2", "row-3", "row-2"]
    assert problems(rows) == [(2, "duplicate_custom_id")]
    assert f"custom_id 'row-2' was already used in row 2 of {one}" in messages(rows)


def test_jsonl_problems(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "in.jsonl",
        b'nonsense\n{"text": "a"}\n{"n": 1}\n{"custom_id": 7.5, "text": "x"}\n{"prompt": 3}\n{"body": {}}\n'
        b'{"text": "\xff"}\n[]\n',
    )
    rows = read([path], CLASSIFY)
    assert problems(rows) == [
        (1, "invalid_json_line"),
        (3, "missing_column"),
        (4, "invalid_custom_id"),
        (5, "missing_column"),
        (6, "invalid_value"),
        (7, "invalid_utf8"),
        (8, "invalid_json_line"),
    ]
    array = write(tmp_path, "array.json", '[{"prompt": "a"}]')
    assert "jq -c" in messages(read([array], MODEL))


def test_stdin_by_its_content() -> None:
    assert bodies(read(["-"], MODEL, stdin=io.BytesIO(b'{"prompt": "a"}')))[0]["model"] == "m"
    assert len(read(["-"], CLASSIFY, stdin=io.BytesIO(b"n,text\n1,a\n2,b\n"))) == 2


def test_globs_and_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "b.csv", "text\nb\n")
    write(tmp_path, "a.csv", "text\na\n")
    rows = read([str(tmp_path / "*.csv")], CLASSIFY)
    assert [body["messages"][0]["content"] for body in bodies(rows)] == ["Classify: a", "Classify: b"]
    with pytest.raises(SettingsError, match="matches no file"):
        read([str(tmp_path / "*.tsv")], CLASSIFY)
    with pytest.raises(SettingsError, match="does not exist"):
        read([str(tmp_path / "none.csv")], CLASSIFY)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(SettingsError, match="pipe it in, and name it -"):
        read([str(tmp_path / "pipe.csv")], CLASSIFY)
    with pytest.raises(SettingsError, match="named twice"):
        read([str(tmp_path / "a.csv"), str(tmp_path / "*.csv")], CLASSIFY)


def test_a_making_says_what_it_makes() -> None:
    assert CLASSIFY.fingerprint == Making(template="Classify: {{text}}", model="m").fingerprint
    assert CLASSIFY.fingerprint != MODEL.fingerprint
    assert parse_setting("body.temperature=0") == ("body.temperature", 0)
    assert parse_setting("body.stop=a=b") == ("body.stop", "a=b")
    for wrong in ("temperature=0", "body.x", "body.=1", "url=/v1/x"):
        with pytest.raises(SettingsError):
            parse_setting(wrong)


@pytest.mark.parametrize(
    "making",
    [
        Making(endpoint="/v1/rerank"),
        Making(template="{{a"),
        Making(template="{{ }}"),
        Making(system="x", endpoint="/v1/embeddings"),
        Making(max_tokens=3, endpoint="/v1/embeddings"),
        Making(endpoint="/v1/messages"),
        Making(delimiter=",,"),
    ],
)
def test_a_making_that_cannot_work_is_refused(making: Making) -> None:
    with pytest.raises(SettingsError):
        making.check()
