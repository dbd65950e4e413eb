"""A job: upload, create, follow, collect. It can be stopped and begun again at any point, by any means.

What could cost money is written down before it is asked for (`state`), and what has arrived is counted in the result
files themselves (`output`), so a second run of the same job does neither twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.errors import BrokenOffError, ConnectionLostError, NotFoundError, ResumeError
from batchery.client.http import Api
from batchery.client.inputs import VerifiedFile
from batchery.client.objects import TAG, Batch, Usage, read_batch
from batchery.client.output import LineFile
from batchery.client.results import Tally, tally
from batchery.client.state import JobFolder, JobState, Landed, Part

WAIT = 5  # seconds that a server may hold the answer to a poll
NEW_BATCH = 60.0  # seconds after its creation in which a batch may still be unknown to a server
BREAKS = 8  # broken-off bodies in a row without one new line, before the connection counts as lost
DRAIN = 60.0  # seconds without a new line, before a finished batch's unfinished file is given up


class Progress(msgspec.Struct, frozen=True):
    """Where a job is.

    Attributes:
        phase: `uploading`, or the batch's status; of several, the least advanced.
        rows: requests in the inputs.
        completed, failed: as the server counts.
        received: result lines in the output so far.
        sent, size: bytes of the upload so far, and in all.
        finished: nothing more is to come.
    """

    phase: str
    rows: int
    completed: int = 0
    failed: int = 0
    received: int = 0
    sent: int = 0
    size: int = 0
    finished: bool = False


class Outcome(msgspec.Struct, frozen=True):
    """How a job ended.

    Attributes:
        batches: one for each input, in order, as the server last reported them.
        tally: what became of the rows.
        usage: tokens, from the server if it counts them, else from the results; None if neither tells.
        received: result lines that this run added.
    """

    batches: tuple[Batch, ...]
    tally: Tally
    usage: Usage | None
    received: int


def errors_path(output: Path) -> Path:
    """The error file that goes with an output file: `out.jsonl` has `out.errors.jsonl`."""
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def pause_between_polls(previous: float | None, *, changed: bool, local: bool, held: bool) -> float:
    """Seconds until the next look at a batch.

    Args:
        previous: the last pause; None before the first.
        changed: whether the last look showed something new.
        local: the server is on this machine.
        held: the server holds its answers until something changes, so that a pause only limits how often that is.
    """
    if held:
        return 0.25 if local else 1.0
    first, longest = (1.0, 5.0) if local else (5.0, 60.0)
    return first if changed or previous is None else min(longest, previous * 1.5)


class Job:
    """One job, from wherever it stands to its end.

    Args:
        api: the server. Closing it, from any thread, stops the job.
        folder: where the state is kept; locked.
        state: the job, new or resumed.
        output: where successes go; failures go to `errors_path(output)`, if there are any.
        on_progress: told where the job is, often; from the thread that `run` is called in, or, during an upload, from
            the HTTP client's.
    """

    def __init__(
        self, api: Api, folder: JobFolder, state: JobState, output: Path, on_progress: Callable[[Progress], None]
    ) -> None:
        self._api = api
        self._folder = folder
        self._state = state
        self._paths = (output, errors_path(output))
        self._on_progress = on_progress
        self._rows = sum(part.source.requests for part in state.parts)
        self._batches: dict[int, Batch] = {}
        self._answers: dict[int, Any] = {}
        self._created: dict[int, float] = {}
        self._server_holds = True

    def run(self) -> Outcome:
        """Go on until every batch is terminal and every result is here.

        Raises:
            ClientError: as `batchery.client.errors` lists them. The job can be run again after any of them.
        """
        self._folder.save(self._state)
        self._output = _Sink(self._paths[0], self._state.output, self._save)
        self._errors = _Sink(self._paths[1], self._state.errors, self._save)
        before = self._output.file.lines + self._errors.file.lines
        try:
            for index, part in enumerate(self._state.parts):
                self._upload(part)
                self._create(index, part)
            self._follow()
        finally:
            self._output.file.close()
            self._errors.file.close()
            self._save()
        self._report(finished=True)
        batches = tuple(self._batches[index] for index in range(len(self._state.parts)))
        counted = tally(self._rows, self._paths)
        received = self._output.file.lines + self._errors.file.lines - before
        return Outcome(batches, counted, _sum_usage(batches) or counted.usage, received)

    def _save(self) -> None:
        self._folder.save(self._state)

    def _upload(self, part: Part) -> None:
        if part.file_id is not None or part.batch_id is not None:
            return
        source = part.source

        def on_sent(sent: int) -> None:
            self._on_progress(Progress("uploading", self._rows, sent=sent, size=source.size))

        name = Path(source.path).name
        part.file_id = self._api.upload(name, source.size, lambda: VerifiedFile(source), part.upload_key, on_sent)
        self._save()

    def _create(self, index: int, part: Part) -> None:
        if part.batch_id is not None:
            return
        assert part.file_id is not None
        # An earlier run may have asked for this batch and died before the answer.
        batch = self._api.find_batch(part.batch_key) if part.create_sent else None
        if batch is None:
            part.create_sent = True
            self._save()
            batch = self._api.create_batch(
                file_id=part.file_id,
                endpoint=part.endpoint,
                window=self._state.window,
                metadata={TAG: part.batch_key},
                key=part.batch_key,
                tag=part.batch_key,
            )
        part.batch_id = batch.id
        self._save()
        self._batches[index] = batch
        self._created[index] = time.monotonic()

    def _follow(self) -> None:
        live = list(range(len(self._state.parts)))
        pause: float | None = None
        while live:
            hold = self._server_holds and len(live) == 1
            changed = [self._look(index, WAIT if hold else 0) for index in live]
            live = [index for index in live if index not in self._batches or not self._batches[index].terminal]
            self._report()
            if live:
                held = hold and self._server_holds
                pause = pause_between_polls(pause, changed=any(changed), local=self._api.server.is_local, held=held)
                self._api.pause(pause)

    def _look(self, index: int, wait: int) -> bool:
        """Ask for one batch, and fetch what it has that is not here; whether anything was new."""
        part = self._state.parts[index]
        assert part.batch_id is not None
        began = time.monotonic()
        try:
            answer, heeded = self._api.get_batch(part.batch_id, wait)
        except NotFoundError:
            if began - self._created.get(index, -NEW_BATCH) < NEW_BATCH:
                return False
            raise
        changed: bool = answer != self._answers.get(index)
        self._answers[index] = answer
        batch = read_batch(answer)
        if wait and not changed and not heeded and not batch.terminal and time.monotonic() - began < wait / 2:
            self._server_holds = False
        if batch.terminal:
            for file_id, sink in ((batch.output_file_id, self._output), (batch.error_file_id, self._errors)):
                if file_id is not None:
                    self._drain(index, part, file_id, sink)
        elif batch.output_file_id is not None and batch.completed > self._output.lines(index):
            self._collect_early(index, part, batch.output_file_id)
        # Only now, so that a batch counts as terminal when its results are here.
        self._batches[index] = batch
        return changed

    def _collect_early(self, index: int, part: Part, file_id: str) -> None:
        """Fetch what a running batch has, from a server that can start after the lines that are here."""
        if part.numbered is False:
            return
        try:
            self._collect(index, part, file_id, self._output, final=False)
        except NotFoundError:
            return  # an id may be given out before there is a file

    def _drain(self, index: int, part: Part, file_id: str, sink: _Sink) -> None:
        """Fetch a finished batch's file to its end."""
        lines, since = sink.lines(index), time.monotonic()
        while not self._collect(index, part, file_id, sink, final=True):
            if sink.lines(index) != lines:
                lines, since = sink.lines(index), time.monotonic()
                self._report()
            elif time.monotonic() - since > DRAIN:
                raise ConnectionLostError(
                    f"the batch is finished, but the server has been giving only {lines} lines of its file {file_id} "
                    f"for {DRAIN:.0f} s"
                )
            else:
                self._api.pause(0.5)

    def _collect(self, index: int, part: Part, file_id: str, sink: _Sink, *, final: bool) -> bool:
        """Fetch until a body arrives whole; whether it was the end of the file."""
        breaks = 0
        while True:
            lines = sink.lines(index)
            try:
                return self._fetch(index, part, file_id, sink, final=final)
            except BrokenOffError:
                breaks = 0 if sink.lines(index) > lines else breaks + 1
                if breaks >= BREAKS:
                    raise
                self._api.pause(min(8.0, 0.25 * 2.0**breaks))

    def _fetch(self, index: int, part: Part, file_id: str, sink: _Sink, *, final: bool) -> bool:
        """One request for a file's lines after those that are here; whether they were its last.

        A server that numbers lines is told where to start. From any other the whole file comes each time, so it is only
        asked at the end, and what is here already is left out.
        """
        have = sink.lines(index)
        after = have if part.numbered else 0
        with self._api.content(file_id, after) as content:
            if part.numbered is None:
                part.numbered = content.last_line is not None
                self._save()
            if not final and not part.numbered:
                return False
            if content.last_line is not None and content.last_line < have:
                raise ResumeError(
                    f"{sink.file.path} has {have} lines of this batch, but the server only has {content.last_line}; "
                    "it was changed by something else. Move it away and run again to fetch everything anew"
                )
            sink.append(index, content.chunks(), skip=0 if part.numbered else have)
            lines = sink.lines(index)
            if content.last_line is not None and lines > content.last_line:
                # It numbers lines but began at the first all the same.
                sink.take_back(index, have)
                part.numbered = False
                self._save()
                return False
            return not content.incomplete and (content.last_line is None or lines == content.last_line)

    def _report(self, *, finished: bool = False) -> None:
        batches = self._batches.values()
        phases = [batch.status for batch in batches if not batch.terminal] or [batch.status for batch in batches]
        self._on_progress(
            Progress(
                phases[0] if phases else "created",
                self._rows,
                completed=sum(batch.completed for batch in batches),
                failed=sum(batch.failed for batch in batches),
                received=self._output.file.lines,
                finished=finished,
            )
        )


class _Sink:
    """A result file and whose lines are in it.

    Args:
        path: the file; what a broken-off earlier run left of its last line is taken away.
        landed: the state's part about it.
        save: writes the state.
    """

    def __init__(self, path: Path, landed: Landed, save: Callable[[], None]) -> None:
        self.file = LineFile(path)
        self._landed = landed
        self._save = save
        if not landed.reconcile(self.file.lines):
            self.file.cut(0)

    def lines(self, part: int) -> int:
        """How many lines of a part are here."""
        return self._landed.lines[part]

    def append(self, part: int, chunks: Any, skip: int) -> None:
        """Append a part's lines, as `LineFile.append` does."""
        if self._landed.last != part:
            self.file.sync()
            self._landed.last = part
            self._save()
        before = self.file.lines
        try:
            self.file.append(chunks, skip)
        finally:
            self._landed.lines[part] += self.file.lines - before

    def take_back(self, part: int, lines: int) -> None:
        """Take back what was appended last, so that the part has so many lines."""
        self.file.cut(self.file.lines - self._landed.lines[part] + lines)
        self._landed.lines[part] = lines


def _sum_usage(batches: tuple[Batch, ...]) -> Usage | None:
    usages = [batch.usage for batch in batches if batch.usage is not None]
    if not usages or len(usages) < len(batches):
        return None
    return Usage(sum(u.input_tokens for u in usages), sum(u.output_tokens for u in usages))
