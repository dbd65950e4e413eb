"""Single requests gathered into batches: each waits a moment for others, and is answered when its result lands.

Each batch is a job (`client.job`) in a thread, so that it is retried, followed and collected as any other. What is
gathered lives as long as the process: nobody could be given the answers after it. No request is ever answered with
another's result.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import itertools
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from batchery.client.answers import Answer, NoAnswerError, answer_of, refusal, without_result
from batchery.client.cancelling import cancelled
from batchery.client.errors import (
    ClientError,
    ConnectionLostError,
    DetachedError,
    QuotaError,
    ServerError,
    SettingsError,
)
from batchery.client.http import Api
from batchery.client.inputs import Input
from batchery.client.job import Job, Outcome
from batchery.client.limits import limits_named, server_name_of
from batchery.client.results import Cause, read_result
from batchery.client.retry import Patience
from batchery.client.server import Server
from batchery.client.state import JobFolder, JobState, new_state
from batchery.wire.lines import Problem, parse_line
from batchery.wire.windows import window_seconds

GATHERED = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")
"""The endpoints whose requests can wait for each other."""


OUTAGE = 15.0  # seconds until a job is gone on with whose server was away for longer than a call is tried
LATE = 3600.0  # seconds after its window in which a batch may still come to its end
PARTING = 15.0  # seconds that batches get to be cancelled in when the program ends


class _Wish:
    """One request that waits for its answer."""

    def __init__(self, line: bytes) -> None:
        self.line = line
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()


class _Group:
    """Requests that will be one batch."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.wishes: dict[str, _Wish] = {}
        self.size = 0
        self.timer: asyncio.TimerHandle | None = None


class Gatherer:
    """Gathers requests. For one event loop.

    Args:
        server: a batch server and its key.
        window: the completion window of its batches.
        seconds: how long a request waits for others.
        requests: how many make a batch at once; None for as many as the server takes.
        retries: how often those that may yet succeed are run again.
        batches: how many may run at a time; while there are so many, requests go on gathering.
        patience: how long a call to the server is tried; None for as long as a command does.
    """

    def __init__(
        self,
        server: Server,
        *,
        window: str = "24h",
        seconds: float = 1.0,
        requests: int | None = None,
        retries: int = 2,
        batches: int = 16,
        patience: Patience | None = None,
    ) -> None:
        if seconds < 0 or batches < 1 or retries < 0 or (requests is not None and requests < 1):
            raise SettingsError("what is gathered takes a time of 0 s or more, and at least one request and one batch")
        self.server = server
        self._window = window
        self._seconds = seconds
        self._retries = retries
        self._batches = batches
        self._patience = patience
        self._limits = limits_named(server_name_of(server.base_url))
        self._requests = min(requests or self._limits.requests, self._limits.requests)
        self._groups: dict[tuple[str, str], _Group] = {}
        self._ready: deque[_Group] = deque()
        self._running: set[_Running] = set()
        self._numbers = itertools.count(1)
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests that no batch has been made of yet."""
        return sum(len(group.wishes) for group in (*self._groups.values(), *self._ready))

    async def send(self, url: str, body: bytes) -> Answer:
        """The answer to a request, which may take as long as the window is. Cancelling it takes the request out of its
        batch, or, if it is the last one that anybody waits for, cancels the batch.

        Args:
            url: one of `GATHERED`.
            body: of the request; JSON.

        Raises:
            NoAnswerError: there is none.
        """
        if self._closed:
            raise NoAnswerError("closed", "the client was closed")
        custom_id = f"gathered-{next(self._numbers)}"
        # A line break can only stand between JSON's tokens, where a space is as good.
        whole = body.replace(b"\r", b" ").replace(b"\n", b" ").strip() or b"null"
        line = b'{"custom_id":"%b","method":"POST","url":"%b","body":%b}' % (custom_id.encode(), url.encode(), whole)
        found = parse_line(line, 1, self._limits.of_a_file)
        if isinstance(found, Problem):
            param = None if found.param is None else found.param.removeprefix("body.")
            return refusal(400, found.message.removeprefix("Line 1: "), found.code, param)
        wish = _Wish(line + b"\n")
        key = url, found.model
        group = self._groups.get(key)
        if group is not None and group.size + len(wish.line) > self._limits.file_bytes:
            self._make_ready(key)
            group = None
        if group is None:
            group = self._groups[key] = _Group(url)
            group.timer = asyncio.get_running_loop().call_later(self._seconds, self._due, key, group)
        group.wishes[custom_id] = wish
        group.size += len(wish.line)
        if len(group.wishes) >= self._requests:
            self._make_ready(key)
        try:
            return await wish.future
        finally:
            if wish.future.cancelled():
                self._give_up(group, custom_id)

    async def close(self) -> None:
        """Answer nothing more: what waits fails, and the batches that run are cancelled, since nobody could be given
        their answers.
        """
        self._closed = True
        for key in list(self._groups):
            self._make_ready(key, start=False)
        for group in self._ready:
            for wish in group.wishes.values():
                _fail(wish, NoAnswerError("closed", "the client was closed before the request was sent"))
        self._ready.clear()
        running = list(self._running)
        for one in running:
            one.abandon()
        # By their threads: they end also where the loop that they answer to has gone.
        await asyncio.gather(*(asyncio.to_thread(one.thread.join) for one in running))

    def _due(self, key: tuple[str, str], group: _Group) -> None:
        group.timer = None
        if self._groups.get(key) is group and len(self._running) < self._batches:
            self._make_ready(key)

    def _make_ready(self, key: tuple[str, str], *, start: bool = True) -> None:
        group = self._groups.pop(key)
        if group.timer is not None:
            group.timer.cancel()
        if group.wishes:
            self._ready.append(group)
        if start:
            self._start()

    def _start(self) -> None:
        """Begin batches while there may be more of them: full ones first, then those whose time has come."""
        while not self._closed and len(self._running) < self._batches:
            if not self._ready:
                due = next((key for key, group in self._groups.items() if group.timer is None), None)
                if due is None:
                    return
                group = self._groups.pop(due)
            else:
                group = self._ready.popleft()
            if group.wishes:
                self._running.add(_Running(self, group))

    def _give_up(self, group: _Group, custom_id: str) -> None:
        wish = group.wishes.pop(custom_id, None)
        if wish is None:
            return
        group.size -= len(wish.line)
        for running in self._running:
            if running.group is group and not group.wishes:
                running.abandon()

    def ended(self, running: _Running) -> None:
        """A batch has come to its end, and another may begin."""
        self._running.discard(running)
        self._start()

    def run_job(
        self, lines: bytes, url: str, requests: int, running: _Running, on_line: Callable[[bytes], None]
    ) -> Outcome:
        """Run requests as a job to its end; in a thread of its own."""
        with _temporary_folder() as name:
            path = Path(name) / "requests.jsonl"
            path.write_bytes(lines)
            source = Input(str(path), len(lines), hashlib.sha256(lines).hexdigest(), requests, url)
            folder = JobFolder(Path(name) / "results.jsonl")
            with folder.locked():
                state = new_state(
                    [source], server=self.server.base_url, window=self._window, endpoint=url, now=time.time()
                )
                try:
                    return self._to_its_end(folder, state, running, on_line)
                except BaseException:
                    _cancel(self.server, state)
                    raise

    def _to_its_end(
        self, folder: JobFolder, state: JobState, running: _Running, on_line: Callable[[bytes], None]
    ) -> Outcome:
        """Run a job, and go on with it after an outage for as long as its batch may have results: nobody else will."""
        until = time.monotonic() + _length(self._window) + LATE
        while True:
            api = Api(self.server, self._patience)
            running.begin(api)
            try:
                job = Job(
                    api,
                    folder,
                    state,
                    folder.path.parent / "results.jsonl",
                    lambda _: None,
                    retries=self._retries,
                    on_line=on_line,
                )
                return job.run()
            except (ConnectionLostError, ServerError, QuotaError) as error:
                exists = any(part.batch_id is not None for part in state.parts)
                if not exists or time.monotonic() > until or getattr(error, "status", None) == 402:
                    raise
            finally:
                api.close()
            running.rest(OUTAGE)


class _Running:
    """A batch that runs in a thread.

    Args:
        gatherer: whose it is.
        group: the requests.
    """

    def __init__(self, gatherer: Gatherer, group: _Group) -> None:
        self.group = group
        self._gatherer = gatherer
        self._loop = asyncio.get_running_loop()
        self._api: Api | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._failures: dict[str, bytes] = {}
        self._lines = b"".join(wish.line for wish in group.wishes.values())
        self._count = len(group.wishes)
        # A daemon, so that a program which forgets to close its client can end.
        self.thread = threading.Thread(target=self._run, name="gathered batch", daemon=True)
        _LIVE.add(self)
        self.thread.start()

    def rest(self, seconds: float) -> None:
        """Wait.

        Raises:
            DetachedError: it was abandoned meanwhile.
        """
        if self._stopped.wait(seconds):
            raise DetachedError("stopped while waiting")

    def begin(self, api: Api) -> None:
        """Its job begins, with these calls."""
        with self._lock:
            self._api = api
            if self._stopped.is_set():
                api.close()

    def abandon(self) -> None:
        """Stop: nobody waits for it any more."""
        with self._lock:
            self._stopped.set()
            if self._api is not None:
                self._api.close()

    def _run(self) -> None:
        outcome: Outcome | None = None
        error: Exception | None = None
        try:
            outcome = self._gatherer.run_job(self._lines, self.group.url, self._count, self, self._on_line)
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever waited
            self._loop.call_soon_threadsafe(self._end, outcome, error)

    def _on_line(self, line: bytes) -> None:
        """A result has landed. One that may be run again waits for the end."""
        result = read_result(line)
        if result.custom_id is None:
            return
        if result.cause in (Cause.transient, Cause.expired):
            self._failures[result.custom_id] = line
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._answer, result.custom_id, line)

    def _answer(self, custom_id: str, line: bytes) -> None:
        wish = self.group.wishes.pop(custom_id, None)
        if wish is None or wish.future.done():
            return
        answer = answer_of(line)
        if isinstance(answer, Answer):
            wish.future.set_result(answer)
        else:
            _fail(wish, answer)

    def _end(self, outcome: Outcome | None, error: Exception | None) -> None:
        for custom_id, line in self._failures.items():
            self._answer(custom_id, line)
        for wish in self.group.wishes.values():
            answer = without_result(outcome, error)
            if isinstance(answer, Answer) and not wish.future.done():
                wish.future.set_result(answer)
            elif not isinstance(answer, Answer):
                _fail(wish, answer)
        self.group.wishes.clear()
        self._gatherer.ended(self)


def _length(window: str) -> float:
    """Seconds; a day where only the server knows."""
    try:
        return window_seconds(window)
    except ValueError:
        return 86_400.0


def _fail(wish: _Wish, error: NoAnswerError) -> None:
    if not wish.future.done():
        # One exception for each, since each gets a traceback of its own.
        wish.future.set_exception(NoAnswerError(error.code, str(error).removesuffix(f" ({error.code})")))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder for the length of the block. One of `tempfile` would go when the program ends, while it is in use."""
    name = tempfile.mkdtemp(prefix="batchery-gathered-")
    try:
        yield name
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _cancel(server: Server, state: JobState) -> None:
    """Cancel what a job that nobody waits for has at the server."""
    api = Api(server, Patience(total=10.0))
    try:
        for part in state.parts:
            batch_id = part.batch_id
            if batch_id is None and part.create_sent:
                found = api.find_batch(part.batch_key)
                batch_id = None if found is None else found.id
            if batch_id is not None:
                cancelled(api, batch_id)
    except ClientError:
        pass  # it cannot be reached, and the batch runs to its end for nobody
    finally:
        api.close()


_LIVE: weakref.WeakSet[_Running] = weakref.WeakSet()


@atexit.register
def _abandon_all() -> None:
    """The program ends without having closed its client: nobody waits any more."""
    live = [running for running in list(_LIVE) if running.thread.is_alive()]
    for running in live:
        running.abandon()
    for running in live:
        running.thread.join(PARTING)
