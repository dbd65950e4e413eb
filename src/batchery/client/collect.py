"""Fetching results as they land: appended to files line by line, never lost and never doubled by a resume.

A server that numbers lines is told where to go on, in both conventions that there are (`offset` and `skip`). From any
other the whole file comes each time, so it is only asked at the end, and what is here already is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from batchery.client.errors import BrokenOffError, ConnectionLostError, NotFoundError, ResumeError
from batchery.client.http import Api
from batchery.client.objects import Batch
from batchery.client.output import LineFile
from batchery.client.state import JobState, Landed

BREAKS = 8  # broken-off bodies in a row without one new line, before the connection counts as lost
DRAIN = 60.0  # seconds without a new line, before a finished batch's unfinished file is given up


class Collector:
    """Brings a job's results to where they land. For one thread.

    Args:
        api: the server.
        state: the job.
        save: writes the state, and returns when it is on disk.
        output, errors: the files that results land in.
        on_landed: called when lines have landed.
    """

    def __init__(
        self,
        api: Api,
        state: JobState,
        save: Callable[[], None],
        output: Path,
        errors: Path,
        on_landed: Callable[[], None],
    ) -> None:
        self._api = api
        self._state = state
        self._save = save
        self._on_landed = on_landed
        self.output = Sink(output, state.output, save)
        self.errors = Sink(errors, state.errors, save)
        self.resumed: set[int] = set()  # parts whose results the server was asked for from a line on

    @property
    def lines(self) -> int:
        """Lines in both files."""
        return self.output.file.lines + self.errors.file.lines

    def collect(self, index: int, batch: Batch) -> None:
        """Fetch what a part's batch has that is not here; of a terminal one, everything."""
        part = self._state.parts[index]
        if batch.terminal:
            if batch.output_file_id is not None:
                self._drain(index, batch.output_file_id, self.output, 0)
            if batch.error_file_id is not None:
                self._drain(index, batch.error_file_id, self.errors, part.errors_before)
        elif batch.output_file_id is not None and batch.completed > self.output.lines(index):
            self._collect_early(index, batch.output_file_id)

    def fetch_anew(self, batch: Batch, file: LineFile) -> None:
        """Append all results of a finished batch, from their first line, to another file."""
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            breaks, lines = 0, file.lines
            while True:
                try:
                    with self._api.content(file_id) as content:
                        file.append(content.chunks())
                    break
                except BrokenOffError:
                    file.cut(lines)
                    breaks += 1
                    if breaks >= BREAKS:
                        raise
                    self._api.pause(min(8.0, 0.25 * 2.0**breaks))

    def sync(self) -> None:
        """Return when everything that has landed is on disk."""
        self.output.file.sync()
        self.errors.file.sync()

    def close(self) -> None:
        """Sync both files, and close them."""
        self.output.file.close()
        self.errors.file.close()

    def _collect_early(self, index: int, file_id: str) -> None:
        """Fetch what a running batch has, from a server that can start after the lines that are here."""
        if self._state.parts[index].numbered is False:
            return
        try:
            self._collect(index, file_id, self.output, 0, final=False)
        except NotFoundError:
            return  # an id may be given out before there is a file

    def _drain(self, index: int, file_id: str, sink: Sink, before: int) -> None:
        """Fetch a finished batch's file to its end."""
        lines, since = sink.lines(index), time.monotonic()
        while not self._collect(index, file_id, sink, before, final=True):
            if sink.lines(index) != lines:
                lines, since = sink.lines(index), time.monotonic()
                self._on_landed()
            elif time.monotonic() - since > DRAIN:
                raise ConnectionLostError(
                    f"the batch is finished, but the server has been giving only {lines} lines of its file {file_id} "
                    f"for {DRAIN:.0f} s"
                )
            else:
                self._api.pause(0.5)

    def _collect(self, index: int, file_id: str, sink: Sink, before: int, *, final: bool) -> bool:
        """Fetch until a body arrives whole; whether it was the end of the file."""
        breaks = 0
        while True:
            lines = sink.lines(index)
            try:
                return self._fetch(index, file_id, sink, before, final=final)
            except BrokenOffError:
                breaks = 0 if sink.lines(index) > lines else breaks + 1
                if breaks >= BREAKS:
                    raise
                self._api.pause(min(8.0, 0.25 * 2.0**breaks))

    def _fetch(self, index: int, file_id: str, sink: Sink, before: int, *, final: bool) -> bool:
        """One request for a file's lines after those that are here; whether they were its last.

        Args:
            before: the part's lines that are of former files.
        """
        part = self._state.parts[index]
        have = sink.lines(index) - before
        after = have if part.numbered else 0
        if after:
            self.resumed.add(index)
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
            lines = sink.lines(index) - before
            if content.last_line is not None and lines > content.last_line:
                # It numbers lines but began at the first all the same.
                sink.take_back(index, have + before)
                part.numbered = False
                self._save()
                return False
            return not content.incomplete and (content.last_line is None or lines == content.last_line)


class Sink:
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

    def append(self, part: int, chunks: Iterable[bytes], skip: int) -> None:
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
