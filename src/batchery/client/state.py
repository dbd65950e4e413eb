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

VERSION = 2


class Part(msgspec.Struct):
    """A piece of the input and the batch made of it.

    Attributes:
        source: the piece as it was checked.
        endpoint: the batch's endpoint.
        upload_key, batch_key: the `Idempotency-Key`s; the latter is also the tag in the batch's metadata.
        input: which of the job's inputs it is a piece of, from 0; None for lines that were gathered to run again.
        round: 0 at first; for lines that run again, which time that is.
        file_id: once the upload was answered.
        create_sent: a `POST /batches` may have reached the server.
        batch_id: once it was answered.
        numbered: whether the server numbers result lines (`X-Last-Line`) and starts after the line it is told to; None
            until it has sent some.
        retried: how often the server was asked to run the batch's failed requests again by itself.
        ended: how the batch had ended when it was asked so last, which tells whether that was heard.
        errors_before: lines of former error files of the batch, which each such retry begins anew.
        gathered: some of its lines run again in another part.
    """

    source: Input
    endpoint: str
    upload_key: str
    batch_key: str
    input: int | None = None
    round: int = 0
    file_id: str | None = None
    create_sent: bool = False
    batch_id: str | None = None
    numbered: bool | None = None
    retried: int = 0
    ended: str | None = None
    errors_before: int = 0
    gathered: bool = False


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
        inputs: its files, as they were checked.
        parts: their pieces, in order, and after them what runs again.
        output, errors: whose lines are in the output and in the error file.
        endpoint: the batches' endpoint where the user named one.
        sources: what the user named, where the inputs were made of it; only path, size and SHA-256 count.
        making: the fingerprint of how rows were made into requests; empty where they are sent as they are.
        format: of the output; see `join`.
        phase: `running`; `joining` once everything has landed and the output is being made; `finished`.
        round: how often failed requests were run again.
        began_at: when the job was first begun, Unix seconds.
        deadline: when it should be done, Unix seconds; None where the user set none.
        deduplicate: whether its batches are to be created so that identical requests are sent once; None after the
            server has refused that.
        version: of this layout.
    """

    server: str
    window: str
    inputs: list[Input]
    parts: list[Part]
    output: Landed
    errors: Landed
    endpoint: str | None = None
    making: str = ""
    sources: list[Input] = []
    format: str = "raw"
    phase: str = "running"
    round: int = 0
    began_at: float = 0.0
    deadline: float | None = None
    deduplicate: bool | None = False
    version: int = VERSION

    def add(self, part: Part) -> None:
        """Add a part, of which nothing has landed."""
        self.parts.append(part)
        self.output.lines.append(0)
        self.errors.lines.append(0)

    @property
    def begun(self) -> bool:
        """Whether there may be a batch. All of a job are created alike; before the first, what is asked for counts."""
        return any(part.create_sent for part in self.parts)

    @property
    def rows(self) -> int:
        """Requests in the inputs."""
        return sum(source.requests for source in self.inputs)


def new_part(source: Input, endpoint: str | None, *, input: int | None = None, round: int = 0) -> Part:
    """A part that has not begun.

    Args:
        source: the piece of input.
        endpoint: the batch's endpoint; None for what the piece's first request is for.
        input: which input it is a piece of.
        round: which time its lines run again.
    """
    keys = f"upload-{uuid.uuid4()}", f"batch-{uuid.uuid4()}"
    return Part(source, endpoint or source.url, *keys, input=input, round=round)


def new_state(
    inputs: Sequence[Input],
    *,
    server: str,
    window: str,
    endpoint: str | None,
    pieces: Sequence[Input] | None = None,
    sources: Sequence[Input] = (),
    making: str = "",
    format: str = "raw",
    now: float = 0.0,
    deadline: float | None = None,
    deduplicate: bool = False,
) -> JobState:
    """The state of a job that has not begun.

    Args:
        inputs: its files, checked.
        server: who is to run it.
        window: the completion window.
        endpoint: the batches' endpoint; None for what the first request of each piece is for.
        pieces: the inputs split to the server's limits, as `split_inputs` does; None if they need no splitting.
        sources: what the inputs were made of.
        making: the fingerprint of how rows were made into requests.
        format: of the output.
        now: Unix seconds.
        deadline: when it should be done, Unix seconds.
        deduplicate: have identical requests sent once.
    """
    paths = [source.path for source in inputs]
    state = JobState(
        server,
        window,
        list(inputs),
        [],
        Landed([]),
        Landed([]),
        endpoint=endpoint,
        making=making,
        sources=list(sources),
        format=format,
        began_at=now,
        deadline=deadline,
        deduplicate=deduplicate,
    )
    for piece in inputs if pieces is None else pieces:
        state.add(new_part(piece, endpoint, input=paths.index(piece.path)))
    return state


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
    # A window that was chosen to meet a deadline is kept, whatever would be chosen now.
    if saved.begun and saved.window != wanted.window and saved.deadline is None and wanted.deadline is None:
        differences.append(f"its window is {saved.window}, and this command says {wanted.window}")
    before, now = saved.sources or saved.inputs, wanted.sources or wanted.inputs
    if len(before) != len(now):
        differences.append(f"its inputs are {_names(before)}, and this command names {_names(now)}")
    else:
        differences += (_changed(a, b) for a, b in zip(before, now, strict=True) if a.sha256 != b.sha256)
    if not differences and saved.making != wanted.making:
        differences.append("its requests were made from the same rows in another way (template, model or settings)")
    if not differences and saved.endpoint != wanted.endpoint:
        differences.append(
            f"its endpoint is {saved.endpoint or saved.parts[0].endpoint}, and this command says "
            f"{wanted.endpoint or 'none'}"
        )
    if not differences and saved.format != wanted.format:
        differences.append(f"its output format is {saved.format}, and this command says {wanted.format}")
    if differences:
        raise ResumeError(
            f"a job that did not end well is saved for this output, but {'; '.join(differences)}. Ask for it as "
            "before, name another output, or say --overwrite, which begins anew and pays for all rows again"
        )
    if saved.deduplicate is None or not saved.begun:
        saved.deduplicate = wanted.deduplicate
    if not saved.begun and saved.deadline is None:
        saved.window, saved.deadline = wanted.window, wanted.deadline
    # The content is what counts; a file may have been moved.
    saved.inputs, saved.sources = wanted.inputs, wanted.sources
    for part in saved.parts:
        if part.input is not None:
            part.source = msgspec.structs.replace(part.source, path=wanted.inputs[part.input].path)
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
        self.receipt_path = self.path / "receipt.json"

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
                if not self.has_state and not self.receipt_path.exists():
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

    def discard(self, *, keep_receipt: bool = False) -> None:
        """Forget the job: everything in the folder goes, except the lock that is held. The state goes first, so that
        none ever speaks of a server's data that is gone.

        Args:
            keep_receipt: of a job that has ended, the receipt stays.
        """
        self._state_path.unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name == "lock" or (keep_receipt and entry == self.receipt_path):
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
