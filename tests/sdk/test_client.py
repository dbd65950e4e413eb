"""`Client` against a real server: rows of every kind, each answered once, in order, typed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from batchery import Client, InputError, OverCostError, SettingsError
from batchery.client.errors import ApiError, AuthError, ResumeError
from batchery.client.state import JobFolder
from batchery.sdk.row_result import RowResult
from batchery.sdk.rows_file import keep_rows
from tests.client.fake_server import FakeServer, Manners

TEMPLATE = "Say what this is: {{text}}"
ROWS = [{"text": f"thing {number}", "label": number} for number in range(7)]


def prompts() -> Iterator[str]:
    yield from (row["text"] for row in ROWS)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        pytest.param(ROWS, TEMPLATE, id="list of mappings"),
        pytest.param((row for row in ROWS), TEMPLATE, id="iterator"),
        pytest.param(pd.DataFrame(ROWS), TEMPLATE, id="pandas"),
        pytest.param(pl.DataFrame(ROWS), TEMPLATE, id="polars"),
        pytest.param(pl.DataFrame(ROWS).lazy(), TEMPLATE, id="lazy polars"),
        pytest.param(pa.Table.from_pylist(ROWS), TEMPLATE, id="pyarrow"),
        pytest.param(list(prompts()), None, id="texts"),
        pytest.param([[{"role": "user", "content": text}] for text in prompts()], None, id="messages"),
    ],
)
def test_rows_of_every_kind_are_answered_once_and_in_order(client: Client, rows: object, template: str | None) -> None:
    job = client.run(rows, model="m", template=template)
    results = job.results()
    assert [result.row for result in results] == list(range(1, 8))
    assert [result.custom_id for result in results] == [f"row-{number}" for number in range(1, 8)]
    assert all(result.ok and result.text and result.usage for result in results)
    assert len({result.text for result in results}) == 7
    if template:
        assert [result.data for result in results] == ROWS
    assert job.receipt().ok == 7
    assert job.failed() == []


def test_files_are_rows_too(client: Client, folder: Path) -> None:
    (folder / "a.csv").write_text("id,text\nx,one\ny,two\n")
    pq.write_table(pa.table({"id": ["z"], "text": ["three"]}), folder / "b.parquet")
    job = client.run([folder / "a.csv", folder / "b.parquet"], model="m", template=TEMPLATE, id_column="id")
    assert [result.custom_id for result in job.results()] == ["x", "y", "z"]
    assert (folder / "a.csv").exists()


def test_rows_come_as_they_land_each_once(client: Client) -> None:
    job = client.run(ROWS, model="m", template=TEMPLATE)
    seen = list(job)
    assert sorted(result.row for result in seen) == list(range(1, 8))
    assert [result.data for result in sorted(seen, key=lambda result: result.row)] == ROWS
    again = list(job)
    assert again == job.results()
    assert sorted(seen, key=lambda result: result.row) == again


def test_missing_values_and_numbers_of_numpy_pass(client: Client) -> None:
    frame = pd.DataFrame({"text": ["a", "b"], "n": [1.5, None], "when": pd.to_datetime(["2026-01-01", None])})
    results = client.run(frame, model="m", template="{{text}} {{n}} {{when}}").results()
    assert [result.data for result in results] == [
        {"text": "a", "n": 1.5, "when": "2026-01-01 00:00:00"},
        {"text": "b", "n": None, "when": None},
    ]


def test_two_columns_of_one_name_are_refused(client: Client) -> None:
    frame = pd.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(SettingsError, match="more than one column 'text'"):
        client.run(frame, model="m", template="{{text}}")


def test_a_list_of_numpy_stays_a_list_also_with_one_item(folder: Path) -> None:
    messages = np.empty(1, dtype=object)
    messages[0] = {"role": "user", "content": "x"}
    kept, _ = keep_rows([{"messages": messages, "tags": np.array([1, 2]), "n": np.int64(3)}], folder)
    assert json.loads(kept.read_bytes()) == {"messages": [messages[0]], "tags": [1, 2], "n": 3}


def test_what_fails_is_told_with_status_and_message(client: Client) -> None:
    rows = ["good", "bad [[simulate status=400]]", "worse [[simulate status=404]]"]
    job = client.run(rows, model="m")
    assert [result.status for result in job].count("ok") == 1
    assert [result.status for result in job.results()] == ["ok", "failed", "failed"]
    failed = job.failed()
    assert [result.error.http_status for result in failed if result.error] == [400, 404]
    assert all(result.error and result.error.message for result in failed)
    assert job.receipt().failed == 2
    assert job.status == "completed"


def test_tables_hold_the_own_columns_and_the_answers(client: Client, folder: Path) -> None:
    job = client.run(pd.DataFrame(ROWS), model="m", template=TEMPLATE)
    frame = job.to_pandas()
    assert list(frame["label"]) == list(range(7))
    assert list(frame["status"]) == ["ok"] * 7
    assert list(frame["output_text"]) == [result.text for result in job.results()]
    assert frame["output_tokens"].sum() == job.receipt().output_tokens
    polars = job.to_polars()
    assert polars["output_text"].to_list() == list(frame["output_text"])
    table = pq.read_table(job.to_parquet(folder / "out.parquet"))
    assert table["output_text"].to_pylist() == list(frame["output_text"])
    assert job.to_csv(folder / "out.csv").read_text().count("thing 3") >= 1


def test_a_row_that_fails_stands_in_the_table_as_failed(client: Client, folder: Path) -> None:
    job = client.run(["fine", "bad [[simulate status=422]]"], model="m")
    table = pq.read_table(job.to_parquet(folder / "out.parquet"))
    assert table["status"].to_pylist() == ["ok", "failed"]
    assert table["http_status"].to_pylist() == [200, 422]
    assert job.to_pandas()["http_status"].tolist() == [200, 422]


def test_the_same_rows_are_the_same_job_and_sent_once(client: Client) -> None:
    first = client.run(ROWS, model="m", template=TEMPLATE, name="once")
    results = first.results()
    second = client.run((dict(row) for row in ROWS), model="m", template=TEMPLATE, name="once")
    assert second.results() == results
    assert second.batch_ids == first.batch_ids
    third = client.run(ROWS, model="m", template=TEMPLATE, name="once", overwrite=True)
    assert third.results()
    assert third.batch_ids != first.batch_ids


def test_other_rows_under_the_same_name_are_refused(client: Client) -> None:
    client.run(ROWS, model="m", template=TEMPLATE, name="taken").results()
    with pytest.raises((SettingsError, ResumeError), match="other"):
        client.run(ROWS[:3], model="m", template=TEMPLATE, name="taken")


def test_a_second_program_leaves_the_first_its_rows(client: Client, folder: Path) -> None:
    jobs = folder / "batchery-jobs"
    jobs.mkdir()
    with JobFolder(jobs / "both.jsonl").locked():
        with pytest.raises(ResumeError, match="another run"):
            client.run(ROWS, model="m", template=TEMPLATE, name="both")
        assert len(list(jobs.glob(".both.rows-*.jsonl"))) == 1


def test_bad_rows_are_named_before_anything_is_sent(client: Client, folder: Path) -> None:
    before = len(client.batches.list(limit=100))
    with pytest.raises(InputError, match="tex") as caught:
        client.run([{"tex": "x"}, {"text": "y"}], model="m", template=TEMPLATE)
    assert caught.value.count == 1
    assert "--" not in str(caught.value)
    assert len(client.batches.list(limit=100)) == before
    assert not list((folder / "batchery-jobs").glob(".job*"))
    with pytest.raises(InputError, match="no model is named; say model"):
        client.run(["x"])


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "no rows"),
        ({"a": 1}, {}, "not dict"),
        ([1], {}, "row 1"),
        (["x"], {"name": "../up"}, "name is"),
        (["x"], {"output": "x.csv"}, "jsonl"),
        (["x"], {"within": "soon"}, "within takes"),
        (["x"], {"template": "{{x"}, "template"),
        (["x"], {"schema": 5}, "schema is"),
        ("nowhere.jsonl", {}, "nowhere.jsonl"),
    ],
)
def test_wrong_arguments_are_named(client: Client, rows: object, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        client.run(rows, model="m", **options)
    assert "--" not in str(caught.value)


def test_more_than_it_may_cost_is_refused(client: Client) -> None:
    with pytest.raises(OverCostError, match="nothing was sent"):
        client.run(["x"], model="unpriced", max_cost=1)


def test_check_finds_problems_and_costs_offline() -> None:
    client = Client("http://127.0.0.1:1")  # nobody is there
    found = client.check(ROWS, model="m", template=TEMPLATE)
    assert found.ok
    assert found.rows == 7
    assert found.cost is not None
    assert found.cost.input_tokens > 0
    bad = client.check([{"text": "x"}, {}], model="m", template=TEMPLATE)
    assert not bad.ok
    assert bad.problem_count == 1
    assert "template names the column 'text'" in bad.problems[0].message
    assert "--" not in bad.problems[0].message
    assert not Path("batchery-jobs").exists()


def test_within_chooses_a_window(client: Client) -> None:
    job = client.run(["x"], model="m", within="4h", name="soon")
    assert job.receipt().window == "1h"
    assert job.receipt().deadline_met


def test_embeddings(client: Client) -> None:
    results = client.run(["x", "y"], model="m", endpoint="/v1/embeddings").results()
    assert all(result.embedding and len(result.embedding) == 8 for result in results)
    assert results[0].embedding != results[1].embedding


def test_a_finished_request_keeps_its_id_and_body_fields_are_added(client: Client) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    row = {"custom_id": "mine", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (result,) = client.run([row], body={"temperature": 0}).results()
    assert result.custom_id == "mine"
    assert result.data is None


def test_identical_requests_are_sent_once_where_that_is_asked_for(client: Client) -> None:
    job = client.run(["x"] * 39 + ["y"], model="m", body={"temperature": 0}, deduplicate=True, name="once-for-all")
    assert all(result.ok and result.text for result in job.results())
    saved = job.receipt().deduplicated
    assert saved is not None
    assert saved.requests == 38
    assert "38 requests answered by another" in job._repr_html_()
    plain = client.run(["x"] * 3, model="m", body={"temperature": 0})
    assert plain.receipt().deduplicated is None


def test_a_refused_option_is_named_as_an_argument() -> None:
    with FakeServer(Manners(unknown="deduplicate")) as fake, Client(fake.base_url) as client:
        with pytest.raises(ApiError, match="does not take deduplicate; leave it out"):
            client.run(["x"], model="m", deduplicate=True).results()
        assert client.run(["x"], model="m").results()[0].ok


def test_raw_calls(client: Client, folder: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    line["body"] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}  # type: ignore[assignment]
    file = client.files.upload(json.dumps(line).encode() + b"\n", filename="in.jsonl")
    assert (file.filename, file.purpose) == ("in.jsonl", "batch")
    assert client.batches.create(file.id, deduplicate=True).deduplicated is not None
    batch = client.batches.create(file.id, metadata={"a": "b"})
    assert batch.deduplicated is None
    while not (batch := client.batches.retrieve(batch.id, wait=5)).terminal:
        pass
    assert batch.output_file_id is not None
    assert json.loads(client.files.content(batch.output_file_id))["custom_id"] == "a"
    assert batch.id in [found.id for found in client.batches.list()]
    assert file.id in [found.id for found in client.files.list(purpose="batch")]
    client.files.delete(file.id)
    assert file.id not in [found.id for found in client.files.list()]
    assert client.batches.cancel(batch.id).status == "completed"


def test_a_picture_of_the_job_escapes_what_comes_from_elsewhere(client: Client) -> None:
    job = client.run([{"custom_id": "<script>", "prompt": "x"}, "bad [[simulate status=400]]"], model="m")
    job.wait()
    picture = job._repr_html_()
    assert "<script>" not in picture
    assert "&lt;script&gt;" in picture
    assert "1 ok, 1 failed" in picture
    assert "completed" in repr(job)


def test_a_server_of_its_own(folder: Path) -> None:
    with Client(upstream="simulator", folder=folder / "jobs") as client:
        job = client.run(["x", "y"], model="m")
        assert [result.ok for result in job] == [True, True]
        assert job.receipt().simulated


def test_importing_batchery_is_cheap_and_the_extras_are_named() -> None:
    code = (
        "import sys, batchery; heavy = {'msgspec', 'pyreqwest', 'openai', 'pydantic', 'rich', 'asyncio'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "sys.modules['openai'] = None\n"
        "try: batchery.AsyncOpenAI\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "batchery[openai]" in done.stdout


def test_no_server_and_two_servers_are_refused() -> None:
    with pytest.raises(SettingsError, match="no server"):
        Client()
    with pytest.raises(SettingsError, match="one of them"):
        Client("http://127.0.0.1:1", upstream="simulator")


def test_the_key_is_refused_by_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.client.fake_server import FakeServer, Manners

    with FakeServer(Manners(key="right")) as server, Client(server.base_url, api_key="wrong") as client:
        job = client.run(["x"], model="m")
        with pytest.raises(AuthError):
            job.results()
        assert job.status == "stopped"


class Answer(BaseModel):
    """What answers must be."""

    label: str
    score: float


def test_types(client: Client) -> None:
    results: list[RowResult[Answer]] = client.run(["x"], model="m", schema=Answer).results()
    assert results[0].parsed is None
    assert results[0].parse_error is not None  # the simulator answers prose
