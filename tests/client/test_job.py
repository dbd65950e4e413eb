"""The job against a fake server in several dialects: every row once, nothing paid for twice, whatever happens."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchery.client.errors import (
    AuthError,
    BrokenOffError,
    ConnectionLostError,
    DetachedError,
    QuotaError,
    ResumeError,
    ServerError,
)
from batchery.client.follow import WAIT, pause_between_polls
from batchery.client.http import Api
from batchery.client.inputs import check_inputs
from batchery.client.job import Job, Outcome, Progress, errors_path
from batchery.client.pieces import split_inputs
from batchery.client.retry import Patience
from batchery.client.server import Server, normalise_base_url
from batchery.client.state import JobFolder, JobState, new_state, resume_state
from tests.client.fake_server import FakeServer, Manners, custom_ids, requests

ROWS = 12
NAMES = [f"row-{number}" for number in range(ROWS)]

OPENAI: dict[str, Any] = {
    "early": False,
    "numbered": False,
    "idempotent": False,
    "honours_wait": False,
    "usage": False,
}
DIALECTS = [
    pytest.param({}, id="contract"),
    pytest.param(OPENAI, id="openai"),
    pytest.param({"ignores_offset": True}, id="always from the first line"),
    pytest.param({"numbered": False}, id="grows without numbering lines"),
    pytest.param({"skip_only": True}, id="skip only"),
    pytest.param({"wrapped": True, "plain_errors": True}, id="wrapped, plain errors"),
    pytest.param({**OPENAI, "no_final_newline": True}, id="no line break at the end"),
]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the client asked for; none of them is really made."""
    asked: list[float] = []

    def pause(self: Api, seconds: float) -> None:
        asked.append(seconds)
        original(self, 0)

    original = Api.pause
    monkeypatch.setattr(Api, "pause", pause)
    return asked


class Desk:
    """A user's folder: an input, an output, and a way to run the job over them."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "out.jsonl"
        self.errors = errors_path(self.output)
        self.inputs = [folder / "in.jsonl"]
        self.inputs[0].write_bytes(requests(ROWS))
        self.seen: list[Progress] = []
        self.said: list[str] = []
        self.folder = JobFolder(self.output)

    def run(
        self,
        server: FakeServer,
        *,
        key: str | None = None,
        window: str = "24h",
        patience: Patience | None = None,
        on_api: Callable[[Api], None] = lambda _: None,
        retries: int = 0,
        format: str = "raw",
        max_requests: int = 50_000,
    ) -> Outcome:
        with self.folder.locked():
            inputs = check_inputs(self.inputs)
            pieces = split_inputs(inputs, max_requests=max_requests)
            wanted = new_state(
                inputs, server=server.base_url, window=window, endpoint=None, pieces=pieces, format=format
            )
            state = resume_state(self.folder.load(), wanted)
            api = Api(Server(normalise_base_url(server.base_url), key, "KEY"), patience)
            on_api(api)
            try:
                seen, said = self.seen.append, self.said.append
                return Job(api, self.folder, state, self.output, seen, said, retries=retries).run()
            finally:
                api.close()

    def ids(self) -> list[str]:
        return custom_ids(self.output.read_bytes())

    def failed_ids(self) -> list[str]:
        return custom_ids(self.errors.read_bytes())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize("manners", DIALECTS)
def test_every_row_arrives_once(desk: Desk, manners: dict[str, Any]) -> None:
    with FakeServer(Manners(**manners)) as server:
        outcome = desk.run(server)
        assert server.files["file-0"] == desk.inputs[0].read_bytes()
        assert server.count("POST", "/v1/files") == server.count("POST", "/v1/batches") == 1
    assert desk.ids() == NAMES
    assert not desk.errors.exists()
    assert (outcome.tally.ok, outcome.tally.failed, outcome.tally.not_run) == (ROWS, 0, 0)
    assert outcome.usage is not None
    assert desk.seen[-1].finished


@pytest.mark.parametrize("format", ["raw", "jsonl"])
def test_what_lands_late_among_what_was_fetched_is_neither_lost_nor_paid_twice(desk: Desk, format: str) -> None:
    with FakeServer(Manners(reorders=True)) as server:
        outcome = desk.run(server, retries=1, format=format)
        assert server.count("POST", "/v1/batches") == 1
    assert desk.ids() == NAMES
    assert (outcome.tally.ok, outcome.tally.not_run) == (ROWS, 0)


def test_results_arrive_while_the_batch_runs(desk: Desk) -> None:
    with FakeServer(Manners(steps=4)) as server:
        desk.run(server)
        offsets = [call.query.get("offset") for call in server.calls if call.path.endswith("/content")]
        assert offsets == [None, "3", "6", "9"]
        assert all(c.query.get("skip") == c.query.get("offset") for c in server.calls)
        assert all(c.headers["prefer"] == f"wait={WAIT}" for c in server.calls if c.path == "/v1/batches/batch_0")
    received = [progress.received for progress in desk.seen if progress.phase in ("in_progress", "completed")]
    assert received == [3, 6, 9, 12, 12]


@pytest.mark.parametrize("manners", DIALECTS)
@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_failures_and_rows_never_run_go_to_the_error_file(desk: Desk, manners: dict[str, Any], end: str) -> None:
    failing, never_run = {"row-1", "row-5"}, {"row-9"}
    with FakeServer(Manners(**manners, failing=failing, never_run=never_run, end=end)) as server:
        outcome = desk.run(server)
    assert sorted(desk.ids() + desk.failed_ids()) == sorted(NAMES)
    assert set(desk.failed_ids()) == failing | never_run
    assert (outcome.tally.ok, outcome.tally.failed, outcome.tally.not_run) == (ROWS - 3, 2, 1)
    assert outcome.tally.reasons[0].text == "400 bad_prompt: no row-1"
    assert outcome.tally.reasons[0].rows == 2
    assert outcome.batches[0].status == end


@pytest.mark.parametrize("manners", DIALECTS)
def test_a_body_that_breaks_off_loses_and_doubles_nothing(desk: Desk, manners: dict[str, Any]) -> None:
    breaks = [1, 0, 200, 400, None, 700, 90]
    with FakeServer(Manners(**manners, breaks=breaks, failing={"row-2", "row-3"})) as server:
        desk.run(server)
    assert sorted(desk.ids() + desk.failed_ids()) == sorted(NAMES)


def test_a_body_that_always_breaks_off_is_a_lost_connection(desk: Desk) -> None:
    with FakeServer(Manners(**OPENAI, breaks=[300] * 50)) as server:
        with pytest.raises(BrokenOffError):
            desk.run(server)
        server.manners.breaks.clear()
        desk.run(server)
    assert desk.ids() == NAMES


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_troubles_are_waited_out(desk: Desk, pauses: list[float], status: int) -> None:
    paths = [("POST", "/v1/files"), ("POST", "/v1/batches"), ("GET", "/v1/batches/.*"), ("GET", "/v1/files/.*/content")]
    with FakeServer(Manners(steps=1)) as server:
        server.manners.troubles = [(method, path, status, {"Retry-After": "7"}) for method, path in paths]
        desk.run(server)
        assert not server.manners.troubles
        assert len(server.batches) == 1
        tries = [call for call in server.calls if (call.method, call.path) == ("POST", "/v1/batches")]
        assert len({call.headers["idempotency-key"] for call in tries}) == 1
        assert len(tries) == 2
    assert sum(pause >= 7 for pause in pauses) == len(paths)
    assert desk.ids() == NAMES


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (401, {}, AuthError),
        (403, {}, AuthError),
        (402, {}, QuotaError),
        (429, {"x-should-retry": "false"}, QuotaError),
        (429, {"Retry-After": "3600"}, QuotaError),
        (503, {"x-should-retry": "false"}, ServerError),
    ],
)
def test_troubles_that_will_not_pass_end_at_once(
    desk: Desk, pauses: list[float], status: int, headers: dict[str, str], error: type[Exception]
) -> None:
    with FakeServer() as server:
        server.manners.troubles = [("POST", "/v1/files", status, headers)]
        with pytest.raises(error, match=f"trouble {status}"):
            desk.run(server)
    assert not pauses


def test_a_server_that_is_not_there_is_given_up_soon(desk: Desk, pauses: list[float]) -> None:
    with FakeServer() as server:
        pass
    with pytest.raises(ConnectionLostError, match="refused"):
        desk.run(server, patience=Patience(unanswered=0.0))
    assert not pauses


@pytest.mark.parametrize("manners", DIALECTS)
def test_a_lost_answer_makes_no_second_batch(desk: Desk, manners: dict[str, Any]) -> None:
    with FakeServer(Manners(**manners)) as server:
        server.manners.lost_answers = [("POST", "/v1/batches")]
        desk.run(server)
        assert len(server.batches) == 1
    assert desk.ids() == NAMES


@pytest.mark.parametrize("format", ["raw", "jsonl"])
@pytest.mark.parametrize("own_retry", [True, False])
@pytest.mark.parametrize("manners", DIALECTS)
def test_what_may_yet_succeed_is_run_again(desk: Desk, manners: dict[str, Any], own_retry: bool, format: str) -> None:
    passing, late = {"row-2", "row-7"}, {"row-9"}
    with FakeServer(Manners(**manners, passing=passing, never_run=late, end="expired", retries=own_retry)) as server:
        outcome = desk.run(server, retries=2, format=format)
        assert server.count("POST", "/v1/batches") == (1 if own_retry else 2)
        assert len(server.batches) == (1 if own_retry else 2)
        if not own_retry:
            assert set(custom_ids(server.files["file-1"])) == passing | late
    assert sorted(desk.ids()) == sorted(NAMES)
    assert not desk.errors.exists()
    assert (outcome.tally.ok, outcome.tally.failed) == (ROWS, 0)
    if format == "jsonl":
        assert desk.ids() == NAMES


def test_what_is_hopeless_is_not_run_again(desk: Desk) -> None:
    with FakeServer(Manners(passing={"row-2"}, failing={"row-3"}, retries=True)) as server:
        outcome = desk.run(server, retries=2)
        assert server.count("POST", ".*/retry") == 0
        assert custom_ids(server.files["file-1"]) == ["row-2"]
        assert len(server.batches) == 2
    assert (outcome.tally.ok, outcome.tally.failed) == (ROWS - 1, 1)
    assert desk.failed_ids() == ["row-3"]


def test_nothing_is_run_again_after_a_cancellation(desk: Desk) -> None:
    with FakeServer(Manners(passing={"row-2"}, end="cancelled")) as server:
        desk.run(server, retries=2)
        assert len(server.batches) == 1
    assert any("batchery retry batch_0 does so" in text for text in desk.said)


@pytest.mark.parametrize("manners", DIALECTS)
@pytest.mark.parametrize("format", ["raw", "jsonl"])
def test_lines_that_the_server_repeats_count_once(desk: Desk, manners: dict[str, Any], format: str) -> None:
    with FakeServer(Manners(**manners, repeats=True, failing={"row-4"})) as server:
        outcome = desk.run(server, format=format)
    assert (outcome.tally.ok, outcome.tally.failed) == (ROWS - 1, 1)
    assert desk.ids() == (NAMES if format == "jsonl" else [name for name in NAMES if name != "row-4"])


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("format", ["raw", "jsonl", "csv"])
def test_a_crash_around_any_rename_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, after: bool
) -> None:
    """Also those by which the output is put in place. The server repeats lines, so that the raw output is made too."""
    replace, moment, crashed = Path.replace, 0, True
    while crashed:
        crashed, left = False, moment
        folder = tmp_path / str(moment)
        folder.mkdir()
        desk = Desk(folder)

        def crashing(self: Path, target: Path) -> Path:
            nonlocal left, crashed
            if left == 0:
                crashed = True
                if after:
                    replace(self, target)
                raise Crash
            left -= 1
            return replace(self, target)

        with FakeServer(Manners(failing={"row-3"}, passing={"row-5"}, repeats=True)) as server:
            monkeypatch.setattr(Path, "replace", crashing)
            try:
                desk.run(server, retries=1, format=format)
            except Crash:
                monkeypatch.setattr(Path, "replace", replace)
                assert desk.run(server, retries=1, format=format).tally.failed == 1
            monkeypatch.setattr(Path, "replace", replace)
            assert len(server.batches) == 2
        if format == "csv":
            rows = list(csv.DictReader(desk.output.open()))
            assert [row["custom_id"] for row in rows] == NAMES
            assert [row["custom_id"] for row in rows if row["status"] == "failed"] == ["row-3"]
        elif format == "jsonl":
            assert desk.ids() == NAMES
        else:
            assert desk.ids() == [name for name in NAMES if name != "row-3"]
            assert desk.failed_ids() == ["row-3"]
        moment += 1
    assert moment > 6


def _around_any_save() -> Iterator[Any]:
    for kind in ((1, "raw", True), (2, "raw", False), (1, "jsonl", False)):
        # Several inputs take twice the saves; what matters to them is how lines are numbered, as in the first dialects.
        for dialect in DIALECTS if kind[0] == 1 else DIALECTS[:4]:
            yield pytest.param(*kind, *dialect.values, id=f"{'-'.join(map(str, kind))}-{dialect.id}")


@pytest.mark.parametrize(("files", "format", "own_retry", "manners"), _around_any_save())
def test_a_crash_around_any_save_is_survived(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: int,
    format: str,
    own_retry: bool,
    manners: dict[str, Any],
) -> None:
    """Kill the job before and after every single write of its state; each time the next run must finish the job."""
    save = JobFolder.save
    moment, crashed = 0, True
    while crashed:
        crashed = False
        for after in (False, True):
            folder = tmp_path / f"{moment}-{after}"
            folder.mkdir()
            desk = Desk(folder)
            if files == 2:
                desk.inputs.append(folder / "more.jsonl")
                desk.inputs[1].write_bytes(requests(5, "more"))
            left = moment

            def crashing(self: JobFolder, state: JobState, after: bool = after) -> None:
                nonlocal left, crashed
                if left == 0:
                    crashed = True
                    if after:
                        save(self, state)
                    raise Crash
                left -= 1
                save(self, state)

            hopeless: set[str] = set() if own_retry else {"row-3", "more-0"}
            troubles: dict[str, Any] = {"failing": hopeless, "passing": {"row-5"}, "retries": own_retry}
            with FakeServer(Manners(**manners, **troubles)) as server:
                monkeypatch.setattr(JobFolder, "save", crashing)
                try:
                    desk.run(server, retries=1, format=format)
                except Crash:
                    monkeypatch.setattr(JobFolder, "save", save)
                    outcome = desk.run(server, retries=1, format=format)
                    assert outcome.tally.failed == len(hopeless & set(NAMES)) + (files - 1)
                monkeypatch.setattr(JobFolder, "save", save)
                assert len(server.batches) == files + (not own_retry)
            names = NAMES + [f"more-{number}" for number in range(5)] * (files - 1)
            failed = desk.failed_ids() if desk.errors.exists() else []
            assert sorted(desk.ids() + failed) == sorted(names)
        moment += 1
    assert moment > 4


@pytest.mark.parametrize("manners", DIALECTS)
def test_a_half_written_line_is_written_anew(desk: Desk, manners: dict[str, Any]) -> None:
    with FakeServer(Manners(**manners)) as server:
        desk.run(server)
        whole = desk.output.read_bytes()
        for kept in (0, 1, len(whole) // 2, len(whole) - 1):
            desk.output.write_bytes(whole[:kept])
            desk.run(server)
            assert desk.output.read_bytes() == whole
        assert len(server.batches) == 1


def test_several_inputs_are_told_apart_after_losing_lines(desk: Desk, tmp_path: Path) -> None:
    desk.inputs.append(tmp_path / "more.jsonl")
    desk.inputs[1].write_bytes(requests(5, "more"))
    with FakeServer() as server:
        desk.run(server)
        whole = desk.output.read_bytes()
        desk.output.write_bytes(b"".join(line + b"\n" for line in whole.split(b"\n")[:-4]))
        desk.run(server)
    assert sorted(desk.ids()) == sorted([*NAMES, *(f"more-{number}" for number in range(5))])


def test_an_output_with_lines_of_something_else_is_refused(desk: Desk) -> None:
    with FakeServer() as server:
        desk.run(server)
        with desk.output.open("ab") as file:
            file.write(b"{}\n")
        with pytest.raises(ResumeError, match="changed by something else"):
            desk.run(server)


def test_a_changed_job_is_refused_with_what_changed(desk: Desk, tmp_path: Path) -> None:
    with FakeServer() as server, FakeServer() as other:
        desk.run(server)
        with pytest.raises(ResumeError, match="its window is 24h, and this command says 1h"):
            desk.run(server, window="1h")
        with pytest.raises(ResumeError, match=f"it runs on {server.base_url}"):
            desk.run(other)
        content = desk.inputs[0].read_bytes()
        desk.inputs[0].write_bytes(content.replace(b"Say 3", b"Say 4"))
        with pytest.raises(ResumeError, match="the same size but other content"):
            desk.run(server)
        desk.inputs[0].write_bytes(content + requests(1, "more"))
        with pytest.raises(ResumeError, match=f"had {len(content)} bytes and now has"):
            desk.run(server)
        desk.inputs = [tmp_path / "other.jsonl"]
        desk.inputs[0].write_bytes(content + b"\n")
        with pytest.raises(ResumeError, match=r"its input is .*in\.jsonl, and .*other\.jsonl has other content"):
            desk.run(server)
        desk.inputs.append(tmp_path / "more.jsonl")
        desk.inputs[1].write_bytes(requests(1, "more"))
        with pytest.raises(
            ResumeError, match=r"inputs are in\.jsonl, and this command names other\.jsonl, more\.jsonl"
        ):
            desk.run(server)
        assert len(server.batches) == 1


def test_an_input_may_be_moved(desk: Desk, tmp_path: Path) -> None:
    with FakeServer() as server:
        desk.run(server)
        desk.inputs = [desk.inputs[0].rename(tmp_path / "renamed.jsonl")]
        desk.run(server)
        assert len(server.batches) == 1


def test_an_input_changed_between_check_and_upload_is_not_sent(desk: Desk) -> None:
    with FakeServer() as server:

        def change(_: Api) -> None:
            desk.inputs[0].write_bytes(requests(ROWS).replace(b"Say 3", b"Say 4"))

        with pytest.raises(ResumeError, match="changed after it was checked"):
            desk.run(server, on_api=change)
        assert not server.files


def test_closing_the_client_detaches_and_the_job_can_go_on(desk: Desk) -> None:
    with FakeServer() as server:
        server.manners.finish.clear()

        def close_later(api: Api) -> None:
            def close() -> None:
                server.wait_until(lambda: server.count("GET", "/v1/batches/batch_0") > 2)
                api.close()

            threading.Thread(target=close).start()

        with pytest.raises(DetachedError):
            desk.run(server, on_api=close_later)
        server.manners.finish.set()
        desk.run(server)
        assert len(server.batches) == 1
    assert desk.ids() == NAMES


def test_a_key_does_not_follow_a_redirect(desk: Desk) -> None:
    with FakeServer() as elsewhere, FakeServer() as server:
        server.manners.troubles = [("POST", "/v1/files", 307, {"Location": elsewhere.base_url + "/v1/files"})]
        with pytest.raises(Exception, match="redirects to"):
            desk.run(server, key="sk-secret")
        assert server.calls[0].headers["authorization"] == "Bearer sk-secret"
        assert not elsewhere.calls


def test_the_batch_may_be_unknown_for_a_moment_after_its_creation(desk: Desk) -> None:
    with FakeServer() as server:
        server.manners.troubles = [("GET", "/v1/batches/batch_0", 404, {})] * 2
        desk.run(server)
    assert desk.ids() == NAMES


@pytest.mark.parametrize(
    ("previous", "changed", "local", "held", "pause"),
    [
        (None, False, True, True, 0.25),
        (None, False, False, True, 1.0),
        (None, False, False, False, 5.0),
        (5.0, False, False, False, 7.5),
        (50.0, False, False, False, 60.0),
        (60.0, True, False, False, 5.0),
        (4.0, False, True, False, 5.0),
    ],
)
def test_polls_get_rarer_while_nothing_changes(
    previous: float | None, changed: bool, local: bool, held: bool, pause: float
) -> None:
    assert pause_between_polls(previous, changed=changed, local=local, held=held) == pause
