"""The saved state: whole or absent, and held by one run at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchery.client.errors import ResumeError, SettingsError
from batchery.client.inputs import Input
from batchery.client.job_request import REQUEST_FILE, JobRequest, load_request, save_request
from batchery.client.making import Making
from batchery.client.state import JobFolder, Landed, new_state, resume_state

SOURCE = Input("/in.jsonl", 10, "00", 2, "/v1/embeddings")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = new_state([SOURCE], server="http://x/v1", window="1h", endpoint=None)
    folder = JobFolder(tmp_path / "out.jsonl")
    with folder.locked():
        assert folder.load() is None
        folder.save(state)
        assert folder.load() == state
    assert state.parts[0].endpoint == "/v1/embeddings"
    assert [path.name for path in tmp_path.iterdir()] == [".out.jsonl.batchery"]


def test_what_was_saved_before_there_was_an_option_is_loaded_without_it(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "out.jsonl")
    with folder.locked():
        folder.save(new_state([SOURCE], server="x", window="1h", endpoint=None, deduplicate=True))
        save_request(folder, JobRequest(inputs=("in",), output=folder.path, making=Making(), deduplicate=True))
        for path in (folder.path / "state.json", folder.path / REQUEST_FILE):
            saved = json.loads(path.read_bytes())
            assert saved.pop("deduplicate") is True
            path.write_text(json.dumps(saved))
        state = folder.load()
        assert state is not None
        assert state.deduplicate is False
        assert load_request(folder, JobRequest).deduplicate is False


@pytest.mark.parametrize(
    ("saved", "create_sent", "goes_on"),
    [(True, True, True), (False, True, False), (True, False, False), (False, False, True), (None, True, True)],
)
def test_a_job_goes_on_as_its_batches_began(saved: bool | None, create_sent: bool, goes_on: bool) -> None:
    began = new_state([SOURCE], server="x", window="1h", endpoint=None)
    began.deduplicate, began.parts[0].create_sent = saved, create_sent
    wanted = new_state([SOURCE], server="x", window="1h", endpoint=None, deduplicate=not saved)
    assert resume_state(began, wanted).deduplicate is goes_on


def test_a_folder_without_a_job_goes(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "out.jsonl")
    with folder.locked():
        pass
    with folder.locked():
        folder.save(new_state([SOURCE], server="x", window="1h", endpoint=None))
        (folder.path / "server").mkdir()
        (folder.path / "server" / "data").touch()
        folder.discard()
    assert not list(tmp_path.iterdir())


def test_a_second_run_of_the_same_job_is_refused(tmp_path: Path) -> None:
    with (
        JobFolder(tmp_path / "out.jsonl").locked(),
        pytest.raises(ResumeError, match="another run"),
        JobFolder(tmp_path / "out.jsonl").locked(),
    ):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError), JobFolder(tmp_path / "none" / "out.jsonl").locked():
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"server": 1}', b"\xff"])
def test_a_state_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = JobFolder(tmp_path / "out.jsonl")
    with folder.locked():
        (folder.path / "state.json").write_bytes(content)
        with pytest.raises(ResumeError):
            folder.load()
        folder.discard()


@pytest.mark.parametrize(
    ("landed", "found", "good", "lines"),
    [
        (Landed([5]), 9, True, [9]),
        (Landed([5]), 2, True, [2]),  # one part: whatever is there is its beginning
        (Landed([5, 2], 1), 9, True, [5, 4]),  # what came since the last save is the last part's
        (Landed([5, 2], 0), 9, True, [7, 2]),
        (Landed([5, 2], 1), 6, False, [0, 0]),  # lines were lost, and nobody knows whose
    ],
)
def test_the_file_tells_what_has_landed(landed: Landed, found: int, good: bool, lines: list[int]) -> None:
    assert landed.reconcile(found) is good
    assert landed.lines == lines
