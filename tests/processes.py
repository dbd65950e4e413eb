"""Real processes for tests: `batchery serve` and `batchery simulate`, started, watched, killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], timeout: float = 30, what: str = "the condition") -> T:
    """Look again and again until there is something; the test fails when it does not come in time."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        time.sleep(0.005)


class Process:
    """A command of ours that prints one line on stdout when it is ready.

    Args:
        arguments: after `batchery`.
        log: takes its stderr; appended to.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self.started = time.monotonic()
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "batchery", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={name: value for name, value in os.environ.items() if not name.startswith("BATCHERY_")},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "listening on" in line, f"it did not start:\n{log.read_text()[-4000:]}"
        self.url = line.split()[-1]

    @property
    def pid(self) -> int:
        """Of the main process."""
        return self.process.pid

    def children(self) -> list[psutil.Process]:
        """The processes that it has started."""
        found: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
        return found

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to the main process only, as from outside; the children it had, which must end by themselves."""
        children = self.children()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        self._close()
        return children

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(40)
        self._close()
        return code

    def _close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)


@contextlib.contextmanager
def simulator(folder: Path, *options: str) -> Iterator[Process]:
    """`batchery simulate` for the length of a block."""
    process = Process(["simulate", "--port", "0", *options], folder / "simulator.log")
    try:
        yield process
    finally:
        process.stop()


def serve(folder: Path, upstream: str, *options: str) -> Process:
    """`batchery serve` on a data folder in `folder`."""
    return Process(
        ["serve", "--port", "0", "--data-dir", str(folder / "data"), "--upstream", upstream, *options],
        folder / "server.log",
    )


@contextlib.contextmanager
def server(folder: Path, upstream: str, *options: str) -> Iterator[Process]:
    """`batchery serve` for the length of a block, stopped cleanly at its end."""
    process = serve(folder, upstream, *options)
    try:
        yield process
    finally:
        code = process.stop()
    assert code == 0, f"the server ended with {code}:\n{process.log.read_text()[-4000:]}"
