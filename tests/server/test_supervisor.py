"""The supervisor: a worker runs whatever happens, until the server stops."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import pytest

from batchery.server import supervisor
from batchery.server.supervisor import Supervisor


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.002)


class Starts:
    """Has a process started in the worker's place that ends with its standard input, as the worker does.

    Args:
        before: called before each.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], Any]) -> None:
        self.started: list[asyncio.subprocess.Process] = []
        self.tries = 0
        start = asyncio.create_subprocess_exec

        async def in_its_place(*_: str, **options: Any) -> asyncio.subprocess.Process:
            self.tries += 1
            await before(self.tries)
            self.started.append(await start("cat", stdin=options["stdin"], stdout=options["stdout"]))
            return self.started[-1]

        monkeypatch.setattr(asyncio, "create_subprocess_exec", in_its_place)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_a_worker_that_cannot_be_started_just_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after it was killed for want of memory, which is still short when the next one is to begin."""

    async def fails_twice(tries: int) -> None:
        if tries in (2, 3):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    starts = Starts(monkeypatch, fails_twice)
    it = Supervisor({}, None)
    await it.start()
    starts.started[0].kill()
    await starts.until(lambda: len(starts.started) == 2)
    await it.stop(5.0)
    assert (starts.tries, [process.returncode for process in starts.started]) == (4, [-9, -15])


async def test_stopping_while_a_worker_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = asyncio.Event()

    async def waits(tries: int) -> None:
        if tries > 1:
            await go_on.wait()

    starts = Starts(monkeypatch, waits)
    it = Supervisor({}, None)
    await it.start()
    starts.started[0].kill()
    await starts.until(lambda: starts.tries == 2)
    stopping = asyncio.create_task(it.stop(5.0))
    await asyncio.sleep(0)
    go_on.set()
    async with asyncio.timeout(5):
        await stopping
    assert starts.started[1].returncode == -9
