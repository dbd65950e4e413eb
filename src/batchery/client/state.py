"""What a job must remember to go on after any interruption, and the folder where it does so.

The state is written, and has reached the disk, before each call that could cost money; so whatever happens, the next
run knows what may already exist at the server. It holds no key and no content.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from batchery.client.errors import ResumeError, SettingsError
from batchery.client.inputs import Input

VERSION = 1


class Part(msgspec.Struct):
    """One input file and the batch made of it.

    Attributes:
        source: the file as it was checked.
        endpoint: the batch's endpoint.
        upload_key, batch_key: the `Idempotency-Key`s; the latter is also the tag in the batch's metadata.
        file_id: once the upload was answered.
        create_sent: a `POST /batches` may have reached the server.
        batch_id: once it was answered.
        numbered: whether the server numbers result lines (`X-Last-Line`) and starts after the line it is told to; None
            until it has sent some.
    """

    source: Input
    endpoint: str
    upload_key: str
    batch_key: str
    file_id: str | None = None
    create_sent: bool = False
    batch_id: str | None = None
    numbered: bool | None = None


class Landed(msgspec.Struct):
    """Whose lines a result file holds. What came since the last save is in the file and not yet here, and is all of one
    part: the state is saved before another part's lines are appended.

    Attributes:
        lines: for each part, how many of its lines are in the file.
        last: the part whose lines are at its end.
    """

    lines: list[int]
    last: int = 0

    def reconcile(self, found: int) -> bool:
        """Take the file's word for how much has landed.

        Args:
            found: complete lines in the file.

        Returns:
            Whether the file can be gone on with. If not (it lost lines, and whose they were is unknown), nothing has
            landed any more: the file has to be emptied, and the server asked for everything again, which is free.
        """
        extra = found - sum(self.lines)
        if extra >= 0 or len(self.lines) == 1:
            self.lines[self.last] += extra
            return True
        self.lines = [0] * len(self.lines)
        return False


class JobState(msgspec.Struct):
    """A job on disk.

    Attributes:
        server: who runs it: a base URL, or a description of a server started for the job.
        window: the completion window.
        parts: one for each input, in order.
        output, errors: whose lines are in the output and in the error file.
        version: of this layout.
    """

    server: str
    window: str
    parts: list[Part]
    output: Landed
    errors: Landed
    version: int = VERSION


def new_state(inputs: Sequence[Input], *, server: str, window: str, endpoint: str | None) -> JobState:
    """The state of a job that has not begun.

    Args:
        inputs: its files, checked.
        server: who is to run it.
        window: the completion window.
        endpoint: the batches' endpoint; None for what the first request of each file is for.
    """
    parts = [Part(i, endpoint or i.url, f"upload-{uuid.uuid4()}", f"batch-{uuid.uuid4()}") for i in inputs]
    return JobState(server, window, parts, Landed([0] * len(parts)), Landed([0] * len(parts)))


def resume_state(saved: JobState | None, wanted: JobState) -> JobState:
    """The state to go on with: the saved one if it is of the same job, the wanted one if nothing was saved.

    Raises:
        ResumeError: they differ; it says in what.
    """
    if saved is None:
        return wanted
    differences = []
    if saved.server != wanted.server:
        differences.append(f"it runs on {saved.server}, and this command names {wanted.server}")
    if saved.window != wanted.window:
        differences.append(f"its window is {saved.window}, and this command says {wanted.window}")
    before, now = [part.source for part in saved.parts], [part.source for part in wanted.parts]
    if len(before) != len(now):
        differences.append(f"its inputs are {_names(before)}, and this command names {_names(now)}")
    else:
        differences += (_changed(a, b) for a, b in zip(before, now, strict=True) if a.sha256 != b.sha256)
    if not differences and [p.endpoint for p in saved.parts] != [p.endpoint for p in wanted.parts]:
        differences.append(
            f"its endpoint is {saved.parts[0].endpoint}, and this command says {wanted.parts[0].endpoint}"
        )
    if differences:
        raise ResumeError(f"an unfinished job is saved for this output, but {'; '.join(differences)}")
    # The content is what counts; a file may have been moved.
    for part, source in zip(saved.parts, now, strict=True):
        part.source = source
    return saved


def _names(inputs: Sequence[Input]) -> str:
    return ", ".join(Path(i.path).name for i in inputs)


def _changed(before: Input, now: Input) -> str:
    if Path(before.path).name != Path(now.path).name:
        return f"its input is {before.path}, and {now.path} has other content"
    if before.size != now.size:
        return f"{now.path} was changed since: it had {before.size} bytes and now has {now.size}"
    return f"{now.path} was changed since: it has the same size but other content"


class JobFolder:
    """The hidden folder beside the output that holds the state, locked against a second run of the same job.

    Args:
        output: the job's output file.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.parent / f".{output.name}.batchery"
        self._state_path = self.path / "state.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and hold it for the length of the block. An empty one goes at the end.

        Raises:
            SettingsError: the folder cannot be made.
            ResumeError: another process holds it.
        """
        try:
            self.path.mkdir(exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(f"cannot keep the job's state in {self.path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ResumeError(f"another run is writing this output already; it holds {self.path}") from None
            try:
                yield
            finally:
                if not self.has_state:
                    (self.path / "lock").unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # not empty: a server's log tells why nothing began
                        self.path.rmdir()
        finally:
            os.close(lock)

    @property
    def has_state(self) -> bool:
        """Whether a job has begun here."""
        return self._state_path.exists()

    def load(self) -> JobState | None:
        """The saved state, or None.

        Raises:
            ResumeError: there is one that cannot be read.
        """
        try:
            content = self._state_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResumeError(f"the saved state {self._state_path} cannot be read: {error.strerror}") from None
        try:
            state = msgspec.json.decode(content, type=JobState)
        except msgspec.MsgspecError as error:
            raise ResumeError(f"the saved state {self._state_path} cannot be understood: {error}") from None
        if state.version != VERSION:
            raise ResumeError(f"the saved state {self._state_path} is of another version of batchery")
        return state

    def save(self, state: JobState) -> None:
        """Write the state, so that after a crash there is the old or the new one, and return when it is on disk."""
        temporary = self._state_path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(state)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state_path)
        sync_folder(self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Forget the job: everything in the folder goes, except the lock that is held. The state goes first, so that
        none ever speaks of a server's data that is gone.
        """
        self._state_path.unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def sync_folder(path: Path) -> None:
    """Make what was created or renamed in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
