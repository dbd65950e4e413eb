"""The supervisor: owns the data folder, and keeps a worker process beside the server.

Dispatch has a process of its own so that neither an upload nor a long list can hold it up. The two are tied by the
worker's standard input: a byte there says that there may be something new, and its end says that the server is gone,
however it went. The worker inherits the lock on the data folder, so that a new server starts only when the last process
of the old one has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

log = structlog.get_logger()

LOCK_PATIENCE = 8.0
"""Seconds to wait for the last process of a former server to end; it does so within 5."""

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0
STEADY = 10.0
"""Seconds after which a worker counts as having started well."""


class FolderInUseError(RuntimeError):
    """Another server uses the data folder."""


class FolderLock:
    """The lock on a data folder, held as long as any process that inherited it lives.

    Args:
        folder: the data folder, which exists.

    Raises:
        FolderInUseError: it stays taken for longer than a former server needs to end.
    """

    def __init__(self, folder: Path, *, patience: float = LOCK_PATIENCE) -> None:
        path = folder / "lock"
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(self.descriptor, 32, 0).decode(errors="replace").strip()
                    os.close(self.descriptor)
                    raise FolderInUseError(
                        f"the data folder {folder} is in use by another batchery server (process "
                        f"{holder or 'unknown'}); stop that one, or give this one another --data-dir"
                    ) from None
                time.sleep(0.02)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of it; a process that inherited it goes on holding it."""
        os.close(self.descriptor)


class Supervisor:
    """Keeps one worker process running.

    Args:
        environment: the worker's environment, with its settings.
        lock: the data folder's lock, which the worker inherits; None where the database is shared.
        config: the file that the settings came from; None for none.
    """

    def __init__(self, environment: Mapping[str, str], lock: FolderLock | None, config: Path | None = None) -> None:
        self._environment = dict(environment)
        self._lock = lock
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Start the worker, and start it again whenever it ends by itself."""
        await self._spawn()
        self._task = asyncio.create_task(self._watch())

    def wake(self) -> None:
        """Tell the worker that there may be something new."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, RuntimeError):  # it has just died; the next one looks by itself
                self._process.stdin.write(b"\n")

    async def stop(self, patience: float) -> None:
        """Let the worker end: what is in flight gets its grace, and what is recorded is committed.

        Args:
            patience: seconds after which it is killed.
        """
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(patience):
                    await process.wait()
            except TimeoutError:
                log.warning("the worker did not end in time and is killed", seconds=patience)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._task is not None:
            await self._task

    async def _spawn(self) -> None:
        command = [sys.executable, "-m", "batchery", "worker", "--exit-with-stdin"]
        if self._lock is not None:
            command.append("--alone")
        if self._config is not None:
            command.append(f"--config={self._config}")
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            env=self._environment,
            pass_fds=() if self._lock is None else (self._lock.descriptor,),
        )

    async def _watch(self) -> None:
        pause = FIRST_PAUSE
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            if self._stopping:
                return
            pause = FIRST_PAUSE if time.monotonic() - started > STEADY else min(pause * 2, LONGEST_PAUSE)
            log.error("the worker ended by itself and is started again", exit_code=code, pause_s=pause)
            await asyncio.sleep(pause)
            await self._spawn_again()
            if self._stopping:
                await self._kill()
                return

    async def _spawn_again(self) -> None:
        """Start the worker, unless this stops; what is in the way, such as a lack of memory, may pass."""
        while not self._stopping:
            try:
                await self._spawn()
                return
            except OSError as error:
                log.error("the worker cannot be started; trying again", reason=str(error), pause_s=LONGEST_PAUSE)
                await asyncio.sleep(LONGEST_PAUSE)

    async def _kill(self) -> None:
        """End a worker that was being started when `stop` looked for one."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
