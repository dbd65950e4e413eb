"""Following batches, many at once: by events where the server has them, else by asking it to hold its answers, else by
asking again and again, ever more rarely while nothing changes.

It reads only. What it hears it hands to one consumer, and it never runs ahead of one that is slower.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any

import msgspec

from batchery.client.errors import ApiError, ClientError, ConnectionLostError, NotFoundError
from batchery.client.events import Event
from batchery.client.http import Api
from batchery.client.objects import Batch, read_batch

WAIT = 5  # seconds that a server may hold the answer to a poll
NEW_BATCH = 60.0  # seconds after its creation in which a batch may still be unknown to a server
HELD = 16  # connections that are held open at once; batches beyond them are asked for
BREAKS = 4  # streams of events in a row that end without one, before they are given up
REST = (0.25, 1.0)  # seconds between two pieces of news from one stream, on this machine and elsewhere
JOIN = 2.0  # seconds that a thread gets to end in
RECONNECT = 2.0  # seconds until a stream of events that broke off is asked for again


def pause_between_polls(
    previous: float | None, *, changed: bool, local: bool, held: bool, advice: float | None = None
) -> float:
    """Seconds until the next look at a batch.

    Args:
        previous: the last pause; None before the first.
        changed: whether the last look showed something new.
        local: the server is on this machine.
        held: the server holds its answers until something changes, so that a pause only limits how often that is.
        advice: what the server asked for by `Retry-After`, which wins.
    """
    if advice is not None:
        return advice
    if held:
        return 0.25 if local else 1.0
    first, longest = (1.0, 5.0) if local else (5.0, 60.0)
    return first if changed or previous is None else min(longest, previous * 1.5)


class News(msgspec.Struct, frozen=True):
    """What was heard.

    Attributes:
        part: of which part's batch.
        batch: as it is now; None if there is an error instead.
        error: why it, or the job, cannot go on; for the consumer to raise.
    """

    part: int = -1
    batch: Batch | None = None
    error: BaseException | None = None


class Follower:
    """Watches over batches, each in a thread, and gives out what changes.

    Args:
        api: the server. Closing it ends the threads.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._news: queue.SimpleQueue[int | News] = queue.SimpleQueue()
        self._watches: dict[int, _Watch] = {}
        self._held = threading.Semaphore(HELD)
        self._resting: deque[tuple[float, _Watch]] = deque()

    @property
    def live(self) -> int:
        """Batches that have not been given out as terminal."""
        return len(self._watches)

    def add(self, part: int, batch_id: str, *, is_new: bool) -> None:
        """Begin to follow a part's batch.

        Args:
            part: its number, for the news.
            batch_id: which batch.
            is_new: it was created just now, so that the server may not know it yet.
        """
        watch = _Watch(self._api, part, batch_id, self._news, self._held, since=time.monotonic() if is_new else None)
        self._watches[part] = watch
        watch.start()

    def join(self) -> None:
        """Wait for the threads, which end once the calls are closed: a program that ends while one of them still waits
        for the network would be aborted.
        """
        for watch in self._watches.values():
            watch.join(JOIN)

    def fail(self, error: BaseException) -> None:
        """Have an error given out among the news; from any thread."""
        self._news.put(News(error=error))

    def next(self, timeout: float) -> News | None:
        """The next news, waiting at most so many seconds for it. `done` is to be called when they have been used."""
        deadline = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            while self._resting and self._resting[0][0] <= now:
                self._resting.popleft()[1].release()
            until = min(deadline, self._resting[0][0]) if self._resting else deadline
            try:
                item = self._news.get(timeout=max(0.0, until - now))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return None
                continue
            return item if isinstance(item, News) else self._watches[item].take()

    def done(self, news: News) -> None:
        """What was given out has been used, so that newer ones may come."""
        watch = self._watches.get(news.part)
        if watch is None or news.batch is None:
            return
        if news.batch.terminal:
            self._watches.pop(news.part).join()
        elif watch.is_streaming:
            self._resting.append((time.monotonic() + REST[not self._api.server.is_local], watch))
        else:
            watch.release()


class _Watch(threading.Thread):
    """One batch. At most one piece of its news is on the way at a time; what is heard meanwhile goes into the next."""

    def __init__(
        self,
        api: Api,
        part: int,
        batch_id: str,
        news: queue.SimpleQueue[int | News],
        held: threading.Semaphore,
        since: float | None,
    ) -> None:
        super().__init__(name=f"batch {part}", daemon=True)
        self._api = api
        self._part = part
        self._batch_id = batch_id
        self._news = news
        self._held = held
        self._since = since
        self._lock = threading.Lock()
        self._free = threading.Event()
        self._free.set()
        self._latest: Any = None
        self._fresh = False
        self.is_streaming = False

    def run(self) -> None:
        """Follow until the batch is terminal, or cannot be followed."""
        holds = self._held.acquire(blocking=False)
        try:
            if not (holds and self._by_events()):
                self.is_streaming = False
                self._by_asking(holds=holds)
        except BaseException as error:  # whatever it is, the consumer raises it
            self._news.put(News(self._part, error=error))
        finally:
            if holds:
                self._held.release()

    def take(self) -> News:
        """The latest that was heard."""
        with self._lock:
            self._fresh = False
            latest = self._latest
        try:
            return News(self._part, read_batch(latest))
        except ClientError as error:
            return News(self._part, error=error)

    def release(self) -> None:
        """The last news have been used."""
        with self._lock:
            if self._fresh:
                self._news.put(self._part)
            else:
                self._free.set()

    def _tell(self, value: Any) -> None:
        with self._lock:
            self._latest, self._fresh = value, True
            if self._free.is_set():
                self._free.clear()
                self._news.put(self._part)

    def _by_events(self) -> bool:
        """Follow the batch's events; whether they led to its end. If not, it has to be asked for."""
        last_id, value, breaks = "", None, 0
        while breaks < BREAKS:
            try:
                with self._api.events(self._batch_id, last_id) as events:
                    if events is None:
                        return False
                    self.is_streaming = True
                    for event in events:
                        breaks, last_id = 0, event.id
                        value = _apply(value, event)
                        if value is None:
                            return False
                        if event.name in ("status", "counts", "lines"):
                            self._tell(value)
                        if event.name == "status" and read_batch(value).terminal:
                            return True
            except ConnectionLostError:
                pass  # it may come back; if not, asking for the batch will tell
            except (ApiError, ValueError):
                return False
            breaks += 1
            self._api.pause(RECONNECT)
        return False

    def _by_asking(self, *, holds: bool) -> None:
        pause: float | None = None
        known: Any = None
        while True:
            wait = WAIT if holds else 0
            began = time.monotonic()
            try:
                look = self._api.get_batch(self._batch_id, wait)
            except NotFoundError:
                if self._since is None or began - self._since > NEW_BATCH:
                    raise
                pause = pause_between_polls(pause, changed=False, local=self._api.server.is_local, held=False)
                self._api.pause(pause)
                continue
            changed, known = look.value != known, look.value
            batch = read_batch(known)
            self._tell(known)
            if batch.terminal:
                return
            while not self._free.wait(0.2):
                if self._api.is_closed:
                    return
            if wait and not changed and not look.heeded and time.monotonic() - began < wait / 2:
                holds = False
            pause = pause_between_polls(
                pause, changed=changed, local=self._api.server.is_local, held=holds, advice=look.advice
            )
            self._api.pause(pause)


def _apply(value: Any, event: Event) -> Any:
    """The batch as it is after an event; None if the events are of another kind than those that are known."""
    try:
        data = msgspec.json.decode(event.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return value
    if not isinstance(data, dict):
        return value
    if event.name == "status":
        return data if isinstance(data.get("id"), str) and isinstance(data.get("status"), str) else None
    if event.name in ("counts", "lines"):
        names = ("request_counts", "usage", "output_file_id", "error_file_id")
        return None if value is None else value | {name: data[name] for name in names if name in data}
    if event.name == "deleted":
        return None
    return value
