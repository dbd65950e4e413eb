"""A job: upload, create, follow, collect. It can be stopped and begun again at any point, by any means.

What could cost money is written down before it is asked for (`state`), and what has arrived is counted in the result
files themselves (`output`), so a second run of the same job does neither twice.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from batchery.client.collect import Collector
from batchery.client.finish import Unfinished, ask_server, ending, gather, requests_of, sort_rows
from batchery.client.follow import Follower
from batchery.client.http import Api
from batchery.client.index import ResultIndex
from batchery.client.join import InputRow, write_joined, write_raw
from batchery.client.objects import Batch, Deduplicated, Usage
from batchery.client.output import LineFile
from batchery.client.results import Tally
from batchery.client.state import JobFolder, JobState, new_part, sync_folder
from batchery.client.tap import Tap
from batchery.client.upload import NOT_DEDUPLICATED, PARALLEL, Submitter

TICK = 1.0  # seconds between two looks at whether anything came


class Progress(msgspec.Struct, frozen=True):
    """Where a job is.

    Attributes:
        phase: `uploading`, `creating`, or the batch's status; of several, the least advanced.
        rows: requests in the inputs.
        completed, failed: as the server counts.
        received: result lines in the output so far.
        sent, size: bytes of the upload so far, and in all.
        finished: nothing more is to come.
        usage: tokens so far, where the server says.
        cost: in US dollars so far, where the price is known too.
    """

    phase: str
    rows: int
    completed: int = 0
    failed: int = 0
    received: int = 0
    sent: int = 0
    size: int = 0
    finished: bool = False
    usage: Usage | None = None
    cost: float | None = None


class Outcome(msgspec.Struct, frozen=True):
    """How a job ended.

    Attributes:
        batches: one for each part, in order, as the server last reported them.
        tally: what became of the rows.
        usage: tokens, from the server if it counts them, else from the results; None if neither tells.
        received: result lines that this run added.
        deduplicated: what the server saved by sending identical requests once; None where it does no such thing.
    """

    batches: tuple[Batch, ...]
    tally: Tally
    usage: Usage | None
    received: int
    deduplicated: Deduplicated | None = None


def errors_path(output: Path) -> Path:
    """The error file that goes with an output file: `out.jsonl` has `out.errors.jsonl`."""
    return output.with_name(f"{output.stem}.errors{output.suffix}")


class Job:
    """One job, from wherever it stands to its end.

    Args:
        api: the server. Closing it, from any thread, stops the job; a job that fails closes it.
        folder: where the state is kept; locked.
        state: the job, new or resumed.
        output: where it goes in the state's format; of the raw one, failures go to `errors_path(output)`.
        on_progress: told where the job is, often, from one thread at a time.
        say: told in a sentence what the user should know.
        retries: how often rows that may yet succeed are run again.
        rows: gives the rows of the inputs, with their own columns; None for finished requests.
        on_line: given each result line as it lands, one that landed in an earlier run first.
    """

    def __init__(
        self,
        api: Api,
        folder: JobFolder,
        state: JobState,
        output: Path,
        on_progress: Callable[[Progress], None],
        say: Callable[[str], None] = lambda _: None,
        *,
        retries: int = 0,
        rows: Callable[[], Iterable[InputRow]] | None = None,
        on_line: Callable[[bytes], None] | None = None,
    ) -> None:
        self._api = api
        self._folder = folder
        self._state = state
        self._output = output
        self._retries = retries
        self._rows = rows or self._finished_requests
        self._on_progress = on_progress
        self._say = say
        self._on_line = on_line
        self._batches: dict[int, Batch] = {}
        self._lock = threading.RLock()
        self._sent = self._size = self._received = 0
        self._warned = False

    def run(self) -> Outcome:
        """Go on until every batch is terminal and every result is here.

        Raises:
            ClientError: as `batchery.client.errors` lists them. The job can be run again after any of them.
        """
        self._save()
        self._collector = Collector(self._api, self._state, self._save, *self._landing(), self._report)
        self._tap = None if self._on_line is None else Tap(self._collector, self._on_line)
        before = self._collector.lines
        try:
            self._settle()
            self._fetch_missed()
            while self._run_again():
                self._settle()
                self._fetch_missed()
        except BaseException:
            self._api.close()
            raise
        finally:
            self._collector.close()
            self._save()
        counted = self._join()
        self._report(finished=True)
        batches = tuple(self._batches[index] for index in range(len(self._state.parts)))
        usage = sum_usage(batches) or counted.usage
        received = max(0, self._collector.lines - before)
        return Outcome(batches, counted, usage, received, sum_deduplicated(batches))

    def _landing(self) -> tuple[Path, Path]:
        """Where results land: in the output itself where it has that form, else, or once the output has been made of
        them, in the job's folder.
        """
        kept = self._folder.path / "results.jsonl", self._folder.path / "errors.jsonl"
        direct = {"raw": (self._output, errors_path(self._output)), "jsonl": (self._output, kept[1])}
        return kept if kept[0].exists() else direct.get(self._state.format, kept)

    def _join(self) -> Tally:
        """Make the output of what has landed."""
        self._state.phase = "joining"
        self._save()
        landed = self._landing()
        with self._index(landed) as index:
            counted = index.tally(self._state.rows)
            if self._state.format == "raw" and not index.repeats:
                return counted
            if landed[0] == self._output:
                landed = self._keep_landed(landed)
        # The lines have the same places in the files that they are kept in.
        with self._index(landed) as index:
            if self._state.format == "raw":
                write_raw((self._output, errors_path(self._output)), self._rows(), index)
            else:
                write_joined(self._state.format, self._output, self._rows, index)
        return counted

    def _keep_landed(self, landed: tuple[Path, Path]) -> tuple[Path, Path]:
        """Put what has landed in the output aside, so that the output can be made of it. The errors go first: once the
        results are there, both are looked for there.
        """
        kept = self._folder.path / "results.jsonl", self._folder.path / "errors.jsonl"
        for old, new in reversed(list(zip(landed, kept, strict=True))):
            if old != new and old.exists():
                temporary = new.with_suffix(".tmp")
                temporary.unlink(missing_ok=True)
                try:
                    temporary.hardlink_to(old)
                except OSError:  # a file system without links
                    shutil.copyfile(old, temporary)
                temporary.replace(new)
        kept[0].touch()
        sync_folder(self._folder.path)
        # What grows again must not grow in the output.
        return kept

    def _index(self, files: tuple[Path, Path] | None = None) -> ResultIndex:
        return ResultIndex(self._folder.path / "index.sqlite", (*(files or self._landing()), self._missed))

    @property
    def _missed(self) -> Path:
        """The file with what was fetched anew, beside what had landed."""
        return self._folder.path / "missed.jsonl"

    def _fetch_missed(self) -> None:
        """Fetch anew what was passed over by going on after the lines that were here. Some servers put what lands late
        among lines that they gave out already: one line comes twice then, and another not at all.
        """
        parts = self._state.parts
        resumed = sorted(self._collector.resumed)
        self._collector.resumed.clear()
        if not resumed:
            return
        self._collector.sync()
        with self._index() as index:
            if not index.repeats:
                return
            missed = [n for n in resumed if any(index.get(name) is None for name, _, _ in requests_of(parts[n].source))]
        for number in missed:
            file = LineFile(self._missed)
            before = file.size
            try:
                self._collector.fetch_anew(self._batches[number], file)
            finally:
                file.close()
            if self._on_line is not None and self._missed.exists():
                with self._missed.open("rb") as lines:
                    lines.seek(before)
                    for line in lines:
                        self._on_line(line)

    def _finished_requests(self) -> Iterator[InputRow]:
        number = 0
        for part in self._state.parts:
            if not part.round:
                for custom_id, _, _ in requests_of(part.source):
                    number += 1
                    yield InputRow(custom_id, number)

    def _run_again(self) -> bool:
        """Run again what may yet succeed; whether anything runs."""
        state, batches = self._state, self._batches
        cancelled = [batch.id for batch in batches.values() if batch.status == "cancelled"]
        if cancelled:
            if state.round < self._retries:
                self._say(f"Nothing is run again by itself after a cancellation; batchery retry {cancelled[0]} does so")
            return False
        unheard = [n for n, part in enumerate(state.parts) if part.ended == ending(batches[n])]
        if not unheard and state.round >= self._retries:
            return False
        self._collector.sync()
        with self._index() as index:
            left = sort_rows(state.parts, batches, index)
            left = {number: rows for number, rows in left.items() if rows.again}
            if not left:
                return False
            if not unheard:
                state.round += 1
            rows = sum(unfinished.again for unfinished in left.values())
            self._say(f"Running {rows} rows again that may yet succeed (try {state.round} of {self._retries})")
            gathered = self._ask_servers(left, unheard)
            pieces = gather(state, gathered, batches, index, self._folder.path / f"retry-{state.round}.jsonl")
        for number in gathered:
            state.parts[number].gathered = True
        for piece in pieces:
            state.add(new_part(piece, state.endpoint, round=state.round))
        self._save()
        return True

    def _ask_servers(self, left: dict[int, Unfinished], unheard: list[int]) -> dict[int, Unfinished]:
        """Have the server run those batches again in which nothing is hopeless; the parts that it does not."""
        gathered = {}
        for number, rows in left.items():
            part = self._state.parts[number]
            if rows.hopeless or part.gathered or (unheard and number not in unheard):
                if not unheard:
                    gathered[number] = rows
                continue
            before = part.errors_before
            # Heard or not, what it has of errors is fetched from its beginning: mostly that is another file.
            part.ended, part.errors_before = ending(self._batches[number]), self._collector.errors.lines(number)
            self._save()
            if ask_server(self._api, part):
                part.retried += 1
                del self._batches[number]
            else:
                part.ended, part.errors_before = None, before
                gathered[number] = rows
        return gathered

    def _save(self) -> None:
        with self._lock:
            self._folder.save(self._state)

    def _settle(self) -> None:
        """Bring every part to a terminal batch, and all that these have, here."""
        state, follower, tap = self._state, Follower(self._api), self._tap
        submitter = Submitter(
            self._api, state, self._save, self._on_sent, is_busy=lambda: follower.live > 0, say=self._say
        )

        def submit(index: int) -> None:
            batch = submitter.submit(state.parts[index])
            with self._lock:
                if batch is not None:
                    self._batches[index] = batch
                    self._check_deduplicated(batch)
                batch_id = state.parts[index].batch_id
                assert batch_id is not None
                follower.add(index, batch_id, is_new=batch is not None)

        def submitted(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None:
                follower.fail(error)

        left = set(range(len(state.parts)))
        for part in state.parts:
            submitter.expect(part)
        pool = ThreadPoolExecutor(PARALLEL, "upload")
        try:
            for index in sorted(left):
                pool.submit(submit, index).add_done_callback(submitted)
            while left:
                news = follower.next(TICK)
                if news is None:
                    self._api.pause(0)  # raises if the client was closed
                    continue
                if news.error is not None:
                    raise news.error
                assert news.batch is not None
                self._collector.collect(news.part, news.batch)
                if tap is not None:
                    tap.give()
                # Only now, so that a batch counts as terminal when its results are here.
                self._batches[news.part] = news.batch
                if news.batch.terminal:
                    left.discard(news.part)
                follower.done(news)
                self._report()
        except BaseException:
            self._api.close()  # ends the uploads that the pool would wait for
            follower.join()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_deduplicated(self, batch: Batch) -> None:
        """Say, once, where a new batch shows that the server does not send identical requests once, as was asked."""
        if self._state.deduplicate and batch.deduplicated is None and not self._warned:
            self._warned = True
            self._say(NOT_DEDUPLICATED)

    def _on_sent(self, sent: int, size: int) -> None:
        with self._lock:
            self._sent, self._size = sent, size
            self._report()

    def _report(self, *, finished: bool = False) -> None:
        with self._lock:
            batches = list(self._batches.values())
            again = sum(part.source.requests for part in self._state.parts if part.round)
            uploading = self._sent < self._size
            phases = [batch.status for batch in batches if not batch.terminal] or [batch.status for batch in batches]
            phase = phases[0] if phases else "creating"
            if uploading and not any(batch.completed or batch.failed for batch in batches):
                phase = "uploading"
            self._on_progress(
                Progress(
                    phase,
                    self._state.rows,
                    completed=sum(batch.completed for batch in batches),
                    failed=max(0, sum(batch.failed for batch in batches) - again),
                    received=self._collector.output.file.lines,
                    sent=self._sent if uploading else 0,
                    size=self._size if uploading else 0,
                    finished=finished,
                    usage=sum_usage(batches),
                )
            )


def sum_usage(batches: Iterable[Batch]) -> Usage | None:
    """The tokens of batches together; None unless each says."""
    total: Usage | None = None
    for batch in batches:
        if batch.usage is None:
            return None
        total = batch.usage if total is None else total + batch.usage
    return total


def sum_deduplicated(batches: Iterable[Batch]) -> Deduplicated | None:
    """What was saved in batches together; None if none says."""
    total: Deduplicated | None = None
    for batch in batches:
        if batch.deduplicated is not None:
            total = batch.deduplicated if total is None else total + batch.deduplicated
    return total
