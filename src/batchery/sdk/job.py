"""A job that runs in the background of a program: its rows as they land, and all of them in order at its end.

It is the command's job (`client.carry_out`) in a thread. It can be gone on with after any interruption, by running the
same rows under the same name again.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from batchery.client.cancelling import cancelled
from batchery.client.carry_out import carry_out, input_rows
from batchery.client.errors import ClientError, SettingsError
from batchery.client.http import Api
from batchery.client.job import Progress
from batchery.client.job_request import JobRequest
from batchery.client.join import flat_records, write_again
from batchery.client.objects import Batch
from batchery.client.progress import Display, Nothing
from batchery.client.receipt import Receipt
from batchery.client.rows import read_rows
from batchery.client.server import Server
from batchery.client.state import JobFolder
from batchery.sdk.display import SHOWN, display_of, html_of
from batchery.sdk.errors import in_words_of_programs, reworded
from batchery.sdk.landing import Landing
from batchery.sdk.row_index import RowIndex
from batchery.sdk.row_result import RowResult, read_row

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

T = TypeVar("T")

AHEAD = 10_000
AHEAD_BYTES = 64 * 1024 * 1024
"""Results, and bytes of them, that wait for whoever goes through them; more come at the end, from the output."""

PARTING = 15.0  # seconds that jobs get to stop in when the program ends

LOOK = 0.1  # seconds between two looks for batches that are still to be cancelled

_END = b""


class BatchJob(Generic[T]):
    """One job. `Client.run` makes it.

    Go through it for each row's outcome as it lands, or ask for `results()`. What asks for the end waits for it, and
    raises what stopped the job (`batchery.ClientError`); the same `run` goes on then.

    Attributes:
        name: of the job.
        schema: that answers follow, as it was named; None for none.
        output: the file with an outcome for each row, in order, once the job has ended.
    """

    def __init__(
        self,
        request: JobRequest,
        server: Server | None,
        *,
        schema: Any,
        rows_file: Path | None,
        show: bool | None,
    ) -> None:
        assert request.output is not None
        self.output: Path = request.output
        self.name = self.output.stem
        self._request = request
        self._server = server
        self.schema = schema
        self._rows_file = rows_file
        self._show = show
        self._landed: deque[bytes] = deque()  # until somebody goes through them
        self._landed_bytes = 0
        self._subscribers: list[queue.SimpleQueue[bytes]] = []
        self._lock = threading.Lock()
        self._rows_lock = threading.Lock()
        _JOBS.add(self)
        self._start()

    def __iter__(self) -> Iterator[RowResult[T]]:
        """Each row once: those that succeed as they land, then, in order, the rest."""
        with contextlib.closing(Landing(self)) as landing:
            while True:
                found = landing.next(3600)
                if isinstance(found, RowResult):
                    yield found
                elif found is not None:
                    return

    def __repr__(self) -> str:
        progress = self.progress
        done = f"{progress.completed}/{progress.rows} done" if progress else "starting"
        return f"<BatchJob {self.name}: {self.status}, {done}>"

    def _repr_html_(self) -> str:
        shown: list[RowResult[Any]] = []
        if self._receipt is not None:
            with contextlib.suppress(OSError):
                shown = list(islice(self.lines(), SHOWN))
        return html_of(self.name, self.progress, self._receipt, self._error, shown)

    @property
    def progress(self) -> Progress | None:
        """Where it is; None before the server was reached."""
        return self._progress

    @property
    def done(self) -> bool:
        """Whether it has ended, however."""
        return self._done.is_set()

    @property
    def status(self) -> str:
        """`starting`, `uploading`, the batch's status, or `stopped` by an error."""
        if self._receipt is not None:
            return self._receipt.status
        if self._error is not None:
            return "stopped"
        return self._progress.phase if self._progress else "starting"

    @property
    def batch_ids(self) -> list[str]:
        """The batches that it has at the server so far."""
        if self._receipt is not None:
            return self._receipt.batches
        state = JobFolder(self.output).load()
        return [part.batch_id for part in state.parts if part.batch_id is not None] if state else []

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end.

        Args:
            timeout: seconds; None for as long as it takes.

        Returns:
            Whether it has ended.

        Raises:
            ClientError: it was stopped by this.
            OSError: its output could not be written.
        """
        if not self._done.wait(timeout):
            return False
        if self._error is not None:
            raise self._error
        return True

    def results(self) -> list[RowResult[T]]:
        """Every row's outcome, exactly one each, in the order of the rows. Waits for the end.

        They are all held in memory; going through the job itself holds one at a time.
        """
        self.wait()
        return list(self.lines())

    def failed(self) -> list[RowResult[T]]:
        """The outcomes that are not `ok`, in order. Waits for the end."""
        self.wait()
        return [result for result in self.lines() if not result.ok]

    def receipt(self) -> Receipt:
        """What came of it: rows, tokens, cost, time. Waits for the end."""
        self.wait()
        assert self._receipt is not None
        return self._receipt

    def retry(self) -> BatchJob[T]:
        """Run again what has not succeeded and may yet: what failed by a passing fault, and what expired. A job whose
        rows are all well, or that is not at its end, is left alone.

        Returns:
            The job itself, which runs again.
        """
        self.wait()
        state = JobFolder(self.output).load()
        if state is not None:
            self._request = msgspec.structs.replace(self._request, retries=state.round + 1, overwrite=False)
            self._start()
        return self

    def cancel(self) -> list[Batch]:
        """Cancel its batches; what is finished is kept, and the job ends with that. What is still on its way to the
        server is waited for, and cancelled as soon as it is a batch.

        Returns:
            The batches as the server has them then.

        Raises:
            ClientError: the server could not be told.
        """
        if self._server is None:
            raise SettingsError("this job runs on a server started for it; close() ends both")
        found: dict[str, Batch] = {}
        with in_words_of_programs(), contextlib.closing(Api(self._server)) as api:
            while True:
                over = self.done  # looked at first, so that no batch which is made meanwhile is missed
                for batch_id in self.batch_ids:
                    if batch_id not in found:
                        found[batch_id] = cancelled(api, batch_id)
                if over or (self._all_made() and any(map(_is_cancelled, found.values()))):
                    return list(found.values())
                self._done.wait(LOOK)

    def close(self) -> None:
        """Stop following; what the server has begun goes on there, and the same `run` collects it later."""
        self._stop()
        self._done.wait()

    def to_records(self) -> list[dict[str, Any]]:
        """The outcomes as flat records: the row's own columns, then `custom_id`, `status`, `output_text`,
        `http_status`, `error_code`, `error_message`, `model`, `finish_reason`, tokens, and `parsed` where a schema was
        given. An own column with the name of one of these has `input_` before it. Waits for the end.
        """
        self.wait()
        records = list(flat_records(self.output))
        if self.schema is not None:
            for record, result in zip(records, self.lines(), strict=True):
                parsed: Any = result.parsed
                record["parsed"] = parsed.model_dump(mode="json") if hasattr(parsed, "model_dump") else parsed
        return records

    def to_pandas(self) -> pd.DataFrame:
        """The outcomes as a DataFrame of pandas; see `to_records`."""
        try:
            import pandas as pd  # noqa: PLC0415
        except ImportError:
            raise SettingsError("to_pandas needs pandas: pip install pandas") from None
        return pd.DataFrame.from_records(self.to_records())

    def to_polars(self) -> pl.DataFrame:
        """The outcomes as a DataFrame of polars; see `to_records`."""
        try:
            import polars as pl  # noqa: PLC0415
        except ImportError:
            raise SettingsError("to_polars needs polars: pip install polars") from None
        return pl.DataFrame(self.to_records(), infer_schema_length=None)

    def to_parquet(self, path: str | Path) -> Path:
        """Write the outcomes as a Parquet file, in flat memory; the columns are those of `to_records` without `parsed`.
        Waits for the end.
        """
        return self._write("parquet", path)

    def to_csv(self, path: str | Path) -> Path:
        """Write the outcomes as a CSV file; see `to_parquet`."""
        return self._write("csv", path)

    def subscribe(self) -> queue.SimpleQueue[bytes]:
        """A queue of result lines as they land, those that landed before first; an empty one is the end."""
        landed: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        with self._lock:
            for line in self._landed:
                landed.put(line)
            self._landed.clear()
            self._landed_bytes = 0
            if self._done.is_set():
                landed.put(_END)
            else:
                self._subscribers.append(landed)
        return landed

    def unsubscribe(self, landed: queue.SimpleQueue[bytes]) -> None:
        """Put nothing more into a queue."""
        with self._lock, contextlib.suppress(ValueError):
            self._subscribers.remove(landed)

    def _all_made(self) -> bool:
        """Whether there is a batch for each of its parts."""
        state = JobFolder(self.output).load()
        return state is not None and all(part.batch_id is not None for part in state.parts)

    def _write(self, format: str, path: str | Path) -> Path:
        self.wait()
        target = Path(path)
        if format == "parquet":
            try:
                import pyarrow  # noqa: F401, PLC0415
            except ImportError:
                raise SettingsError("Parquet needs pyarrow: pip install 'batchery[parquet]'") from None
        if not target.absolute().parent.is_dir():
            raise SettingsError(f"the folder {target.parent} does not exist")
        write_again(format, target.absolute(), self.output)
        return target

    def lines(self) -> Iterator[RowResult[T]]:
        """The outcomes in the output, one after the other; of a job that has ended."""
        with self.output.open("rb") as file:
            for line in file:
                yield read_row(line, self.schema)

    def row_index(self) -> RowIndex | None:
        """The rows by `custom_id`; None where they are kept no longer, since the output has all of them."""
        with self._rows_lock:
            if self._rows_file is not None and not self._rows_file.exists():
                return None
            return RowIndex(input_rows(partial(read_rows, self._request.inputs, self._request.making)))

    def _start(self) -> None:
        """Begin, and return when the job is on its way, or raise why it is not."""
        self._done = threading.Event()
        self._begun = threading.Event()
        self._closed = False
        self._api: Api | None = None
        self._error: Exception | None = None
        self._receipt: Receipt | None = None
        self._progress: Progress | None = None
        try:
            threading.Thread(target=self._work, name=f"job {self.name}", daemon=True).start()
            self._begun.wait()
        except BaseException:  # Ctrl-C: nobody has the job yet, who could close it
            self._stop()
            raise
        if self._done.is_set() and self._error is not None:
            raise self._error

    def _stop(self) -> None:
        self._closed = True
        if self._api is not None:
            self._api.close()

    def _work(self) -> None:
        request = msgspec.structs.replace(self._request, lines_to=self._on_line)
        try:
            self._receipt = carry_out(request, _Listener(self), server=self._server)
            if self._rows_file is not None and self._receipt.exit_code == 0:
                with self._rows_lock:  # whoever goes through the job may be reading it
                    self._rows_file.unlink(missing_ok=True)
        except ClientError as error:
            self._error = reworded(error)
            self._forget_rows()
        except Exception as error:
            self._error = error
        with self._lock:
            self._done.set()
            for landed in self._subscribers:
                landed.put(_END)
            self._subscribers.clear()
        self._begun.set()

    def _forget_rows(self) -> None:
        """Remove the rows of a job that has not begun, unless another run of it, which reads them, is about to."""
        folder = JobFolder(self.output)
        if self._rows_file is not None:
            with contextlib.suppress(ClientError), folder.locked():
                if not folder.has_state:
                    self._rows_file.unlink(missing_ok=True)

    def _on_line(self, line: bytes) -> None:
        with self._lock:
            if not self._subscribers:
                self._landed.append(line)
                self._landed_bytes += len(line)
                while len(self._landed) > AHEAD or self._landed_bytes > AHEAD_BYTES:
                    self._landed_bytes -= len(self._landed.popleft())
            for landed in self._subscribers:
                # As if all that wait were as long as this one; mostly they are about that.
                if landed.qsize() < AHEAD and landed.qsize() * len(line) < AHEAD_BYTES:
                    landed.put(line)


def _is_cancelled(batch: Batch) -> bool:
    """Whether it is cancelled, or going to be: after that a job runs nothing again."""
    return batch.status == "cancelled" or not batch.terminal


class _Listener:
    """Hears for a job how it goes."""

    def __init__(self, job: BatchJob[Any]) -> None:
        self._job = job
        self._display: Display = Nothing()

    def say(self, text: str) -> None:
        """Nothing: a program asks when it wants to know."""

    def begin(self, api: Api) -> None:
        job = self._job
        job._api = api
        if job._closed:
            api.close()
        self._display = display_of(job, job._show)
        job._begun.set()

    def update(self, progress: Progress) -> None:
        self._job._progress = progress
        self._display.update(progress)

    def end(self) -> None:
        self._display.close()


_JOBS: weakref.WeakSet[BatchJob[Any]] = weakref.WeakSet()


@atexit.register
def _stop_following() -> None:
    """The program ends: what the server has begun goes on there, and the same `run` goes on later."""
    for job in list(_JOBS):
        if not job.done:
            job._stop()
            job._done.wait(PARTING)
