"""A job of a program: answers read by a schema, gone on with after it was left or killed, run again, cancelled."""

from __future__ import annotations

import _thread
import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from batchery import AsyncClient, Client, ConnectionLostError
from batchery.client import carry_out, follow
from batchery.client.errors import AuthError, DetachedError, ResumeError
from batchery.client.http import Api
from batchery.client.retry import Patience
from batchery.client.server import Server
from batchery.client.state import JobFolder
from batchery.sdk import job as job_module
from batchery.sdk.schema import parse
from tests.client.fake_server import FakeServer, Manners
from tests.processes import server, wait_for
from tests.sdk.receiving import JsonModel


class Answer(BaseModel):
    """What answers must be."""

    label: str
    score: float


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "pause_between_polls", lambda *_, **__: 0.02)


def test_answers_are_read_by_the_schema(tmp_path: Path) -> None:
    with JsonModel() as model, server(tmp_path, model.url) as process, Client(process.url) as client:
        job = client.run(["good", "bad", "break it"], model="m", schema=Answer)
        results = job.results()
        assert [result.parsed for result in results[:2]] == [
            Answer(label="good", score=0.5),
            Answer(label="bad", score=0.5),
        ]
        assert results[2].ok
        assert results[2].parsed is None
        assert results[2].parse_error
        assert job.to_pandas()["parsed"][0] == {"label": "good", "score": 0.5}
        sent = model.bodies[0]["response_format"]["json_schema"]
        assert sent["strict"] is True
        assert sent["name"] == "Answer"
        assert sent["schema"]["additionalProperties"] is False
        by_json = client.run(["x"], model="m", schema={"type": "object", "properties": {"n": {"type": "integer"}}})
        assert by_json.results()[0].parsed == {"n": 1}
        by_short_form = client.run(["x"], model="m", schema="yes: boolean")
        assert by_short_form.results()[0].parsed == {"yes": True}


def test_a_job_that_was_left_is_gone_on_with() -> None:
    with FakeServer(Manners()) as fake:
        fake.manners.finish.clear()
        with Client(fake.base_url) as client:
            job = client.run(["a", "b"], model="m", name="left")
            wait_for(lambda: job.batch_ids)
        assert job.done
        with pytest.raises(DetachedError):
            job.results()
        fake.manners.finish.set()
        with Client(fake.base_url) as client:
            results = client.run(iter(["a", "b"]), model="m", name="left").results()
        assert [result.status for result in results] == ["ok", "ok"]
        assert fake.count("POST", "/v1/files") == fake.count("POST", "/v1/batches") == 1


SCRIPT = """
import sys
from batchery import Client
client = Client(sys.argv[1], folder=sys.argv[2])
job = client.run(({"prompt": f"number {n}"} for n in range(40)), model="m")
print(job.name, flush=True)
for result in job:
    print(result.custom_id, flush=True)
"""


def test_a_killed_program_goes_on_and_pays_once(tmp_path: Path) -> None:
    with FakeServer(Manners()) as fake:
        fake.manners.finish.clear()
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, fake.base_url, str(tmp_path / "jobs")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        wait_for(lambda: fake.count("POST", "/v1/batches"))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
        fake.manners.finish.set()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, fake.base_url, str(tmp_path / "jobs")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert sorted(done.stdout.split()) == sorted([name, *(f"row-{n}" for n in range(1, 41))])
        assert fake.count("POST", "/v1/files") == fake.count("POST", "/v1/batches") == 1


FORGETFUL = {
    "job": """
import sys
from batchery import Client
job = Client(sys.argv[1]).run(["x"], model="m")
while not job.batch_ids:
    pass
""",
    "drop-in": """
import asyncio, sys, time
from batchery import AsyncOpenAI
async def main():
    client = AsyncOpenAI(base_url=sys.argv[1], gather_seconds=0)
    await asyncio.wait([asyncio.create_task(client.embeddings.create(model="m", input="x"))], timeout=1)
asyncio.run(main())
""",
}


@pytest.mark.parametrize("kind", FORGETFUL)
def test_a_program_that_closes_nothing_can_end(kind: str) -> None:
    with FakeServer(Manners()) as fake:
        fake.manners.finish.clear()
        done = subprocess.run(
            [sys.executable, "-c", FORGETFUL[kind], fake.base_url],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert fake.count("POST", "/v1/batches") == 1
        cancelled = any(call.path.endswith("/cancel") for call in fake.calls)
        assert cancelled == (kind == "drop-in")


def test_retry_runs_again_what_may_yet_succeed() -> None:
    with (
        FakeServer(Manners(passing={"row-2"}, failing={"row-3"}, retries=True)) as fake,
        Client(fake.base_url) as client,
    ):
        job = client.run(["a", "b", "c"], model="m", retries=0)
        assert [result.status for result in job] == ["ok", "failed", "failed"]
        assert job.receipt().failed == 2
        again = job.retry()
        assert again is job
        assert [result.status for result in job.results()] == ["ok", "ok", "failed"]
        assert job.receipt().retries == 1
        assert [result.custom_id for result in job.failed()] == ["row-3"]


@pytest.mark.parametrize(
    ("there", "text"),
    [(r'"choices": [{"message": {"content": "cut \ud83d"}}]', "cut \ufffd"), ('"n": 1e999', None), ('"n": NaN', None)],
)
def test_what_only_the_grammar_of_json_allows_takes_no_other_row_along(there: str, text: str | None) -> None:
    with FakeServer(Manners(altered={'"echo": "row-2"': there})) as fake, Client(fake.base_url) as client:
        job = client.run(["a", "b"], model="m")
        assert [result.status for result in job] == ["ok", "ok"]
        assert [result.text for result in job.results()] == [None, text]
        assert len(job.to_pandas()) == 2


def test_an_answer_that_is_nested_without_end_is_told() -> None:
    value, problem = parse("[" * 10_000, "label: yes|no")
    assert value is None
    assert "nested" in str(problem)


def test_rows_can_be_gone_through_after_the_end() -> None:
    with FakeServer(Manners()) as fake, Client(fake.base_url) as client:
        job = client.run([{"text": "a"}, {"text": "b"}], model="m", template="{{text}}")
        job.wait()
        assert [result.data for result in job] == [{"text": "a"}, {"text": "b"}]


def test_what_is_still_being_sent_is_cancelled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()

    class Folder(JobFolder):
        def load(self) -> Any:
            found = super().load()
            looked.set()
            return found

    def hold(number: int, _: bool) -> None:
        if fake.calls[number].path == "/v1/batches":
            looked.wait(20)

    with FakeServer(Manners()) as fake, Client(fake.base_url) as client:
        monkeypatch.setattr(job_module, "JobFolder", Folder)
        fake.manners.on_call = hold
        fake.manners.finish.clear()
        job = client.run(["a", "b"], model="m")
        assert [batch.id for batch in job.cancel()] == ["batch_0"]
        job.wait()
        assert job.status == "cancelled"


def test_ctrl_c_while_rows_are_checked_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noticed, sent = threading.Event(), []

    def check_slowly(request: Any, listener: Any, *, server: Server) -> Any:
        _thread.interrupt_main()
        assert noticed.wait(20)
        api = Api(server)
        listener.begin(api)
        sent.append(not api.is_closed)
        raise DetachedError("stopped")

    monkeypatch.setattr(job_module, "carry_out", check_slowly)
    with Client("http://127.0.0.1:1") as client, pytest.raises(KeyboardInterrupt):
        client.run(["a"], model="m")
    noticed.set()
    wait_for(lambda: sent)
    assert sent == [False]


def test_little_waits_for_nobody_and_no_row_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "AHEAD_BYTES", 1000)
    with FakeServer(Manners()) as fake, Client(fake.base_url) as client:
        job = client.run([f"{n}" for n in range(40)], model="m")
        job.wait()
        assert 0 < sum(map(len, job._landed)) <= 1000
        assert [result.row for result in job] == list(range(1, 41))


def test_a_run_beside_another_of_the_same_rows_leaves_these_alone(tmp_path: Path) -> None:
    (tmp_path / "batchery-jobs").mkdir()
    output = tmp_path / "batchery-jobs" / "x.jsonl"
    with Client("http://127.0.0.1:1") as client:
        with JobFolder(output).locked(), pytest.raises(ResumeError, match="another run"):
            client.run(["a"], model="m", name="x")
        assert list(output.parent.glob(".x.rows-*"))


def test_a_key_that_the_server_repeats_is_not_told() -> None:
    with FakeServer(Manners(key="right")) as fake, Client(fake.base_url, api_key="sk-secret") as client:
        with pytest.raises(AuthError, match=r"wrong key \[key\]"):
            client.run(["a"], model="m").results()
        with pytest.raises(AuthError) as caught:
            client.models()
        assert "sk-secret" not in str(caught.value)


def test_cancel_keeps_what_is_finished() -> None:
    with FakeServer(Manners(end="cancelled", never_run={"row-2"})) as fake, Client(fake.base_url) as client:
        fake.manners.finish.clear()
        job = client.run(["a", "b"], model="m")
        wait_for(lambda: job.batch_ids)
        assert [batch.id for batch in job.cancel()] == job.batch_ids
        assert [call.path for call in fake.calls if call.path.endswith("/cancel")]
        fake.manners.finish.set()
        first, second = job.results()
        assert first.status == "ok"
        assert second.status in ("cancelled", "not_run")
        assert job.status == "cancelled"


def test_a_lost_server_is_told_and_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry_out, "Api", lambda found: Api(found, Patience(unanswered=0.0, total=0.1)))
    with Client("http://127.0.0.1:1") as client, pytest.raises(ConnectionLostError):
        client.run(["x"], model="m").results()


async def test_the_asynchronous_client(served: str, tmp_path: Path) -> None:
    async with AsyncClient(served) as client:
        checked = await client.check(["x"], model="m")
        assert checked.ok
        job = await client.run([{"text": f"{n}"} for n in range(9)], model="m", template="Say {{text}}")
        seen = [result async for result in job]
        assert sorted(result.row for result in seen) == list(range(1, 10))
        assert [result.row for result in await job.results()] == list(range(1, 10))
        assert await job.failed() == []
        assert (await job.receipt()).ok == 9
        assert len(await job.to_pandas()) == 9
        assert (await job.to_parquet(tmp_path / "x.parquet")).exists()
        assert job.batch_ids[0] in [batch.id for batch in await client.batches.list()]
        file = await client.files.upload(b'{"a": 1}\n')
        assert await client.files.content(file.id) == b'{"a": 1}\n'
        once = await client.run(["x"] * 5, model="m", body={"temperature": 0}, deduplicate=True)
        saved = (await once.receipt()).deduplicated
        assert saved is not None
        assert saved.requests == 4
        created = await client.batches.create(file.id, deduplicate=True)
        assert created.deduplicated is not None


async def test_cancelling_a_task_leaves_the_job() -> None:
    with FakeServer(Manners()) as fake:
        fake.manners.finish.clear()
        async with AsyncClient(fake.base_url) as client:
            job = await client.run(["x"], model="m")
            waiting = asyncio.create_task(job.results())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(waiting, 0.05)
            assert not job.done
            fake.manners.finish.set()
            assert [result.status for result in await job.results()] == ["ok"]


class Shell:
    """What of IPython a notebook's display needs."""

    def __init__(self) -> None:
        self.kernel = object()
        self.pictures: list[str] = []

    def get_ipython(self) -> Shell:
        return self

    def display(self, shown: Any, *, display_id: bool) -> Shell:
        assert display_id
        self.update(shown)
        return self

    def update(self, shown: Any) -> None:
        self.pictures.append(shown._repr_html_())


def test_a_notebook_shows_the_job_and_its_end(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell()  # IPython is no dependency, and its kernel needs a notebook
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", shell)
    with Client(served) as client:
        job = client.run(["shown in a notebook"], model="m")
        job.wait()
    assert len(shell.pictures) >= 2
    assert "0 of 1 done" in shell.pictures[0] or "0 of 0 done" in shell.pictures[0]
    assert "1 of 1 done" in shell.pictures[-1]
    assert "1 ok" in job._repr_html_()
