"""Starting a server (and an upstream for it: a simulated one or a local model) for the length of one job, on loopback.

What is started here ends with this process, however that ends: it is told so by the end of its standard input, or by
the kernel. It must never outlive the job. That two servers never have one data folder at once, also when the first of
them is still on its way out, is seen to by the server itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from batchery.client.errors import ConnectionLostError, SettingsError
from batchery.client.server import Server, normalise_base_url
from batchery.wire.windows import DEFAULT_WINDOWS

READY = 30.0  # seconds for a child to say where it listens; it may have to wait for a former one to end
LOADED = 600.0  # the same for one that loads a model
STOP = 10.0  # seconds for a child to end after SIGTERM
TAIL = 15  # lines of the log that are shown when a child dies

_PR_SET_PDEATHSIG = 1


class LocalServerError(ConnectionLostError):
    """The server that was started for the job ended before the job."""


class LocalServer:
    """A server that runs for this job, with what it needs.

    Attributes:
        base_url: where it listens, on loopback.
    """

    def __init__(self, base_url: str, children: Sequence[_Child]) -> None:
        self.base_url = base_url
        self._children = children

    def check(self) -> None:
        """Raises LocalServerError if a process of it has ended."""
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                raise LocalServerError(f"{child.name} ended by itself ({_how(code)}).{child.log_tail()}")


@contextmanager
def local_server(
    data_dir: Path, upstream: str, *, upstream_key_env: str | None, max_in_flight: int | None, window: str
) -> Iterator[LocalServer]:
    """Start a server, and stop it at the end of the block.

    Args:
        data_dir: its data folder, made if missing; its log goes there too.
        upstream: the URL of an inference server, or of several, separated by commas; or `simulator`, or a GGUF model's
            path, to have one started as well.
        upstream_key_env: the environment variable with the upstream's key.
        max_in_flight: requests in flight; None for the server's own choice.
        window: a completion window that it must offer.

    Raises:
        SettingsError: it does not start; with the last lines of its log.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are nobody else's business
    except OSError as error:
        raise SettingsError(f"cannot make the data folder {data_dir}: {error.strerror}") from None
    children: list[_Child] = []
    with ExitStack() as stack:
        if upstream == "simulator":
            simulator = _Child("the simulator", ["simulate", "--port", "0"], data_dir / "simulate.log", linked=True)
            stack.callback(simulator.stop)
            children.append(simulator)
            upstream = simulator.address("batchery simulator listening on ")
        elif is_model(upstream):
            arguments = ["llama", upstream, "--port", "0"]
            arguments += [] if max_in_flight is None else ["--parallel", str(max_in_flight)]
            model = _Child("the model's server", arguments, data_dir / "llama.log", linked=True)
            stack.callback(model.stop)
            children.append(model)
            upstream = model.address("batchery llama listening on ", LOADED)
        windows = ",".join(dict.fromkeys((*DEFAULT_WINDOWS, window)))
        arguments = ["serve", "--host", "127.0.0.1", "--port", "0", "--data-dir", str(data_dir), "--upstream", upstream]
        arguments += ["--completion-windows", windows, "--exit-with-stdin"]
        if upstream_key_env is not None:
            arguments += ["--upstream-key-env", upstream_key_env]
        if max_in_flight is not None:
            arguments += ["--max-in-flight", str(max_in_flight)]
        server = _Child("the server", arguments, data_dir / "serve.log")
        stack.callback(server.stop)
        # The server is the likelier one to tell why, so it is looked at first.
        children.insert(0, server)
        yield LocalServer(server.address("batchery listening on "), children)


def is_model(upstream: str) -> bool:
    """Whether it names a GGUF model in a file, and no URL."""
    return upstream.endswith(".gguf") and "://" not in upstream


def check_upstream(upstream: str, key_env: str | None) -> None:
    """Raises SettingsError if a server cannot be started in front of it, as far as that is seen beforehand."""
    if is_model(upstream):
        if key_env is not None:
            raise SettingsError("--upstream-key-env is for an inference server; a local model needs no key")
        try:
            with Path(upstream).open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
        except OSError as error:
            raise SettingsError(f"cannot read the model {upstream}: {error.strerror}") from None
        if not is_gguf:
            raise SettingsError(f"{upstream} is not a GGUF model: it does not begin with GGUF")
    elif upstream != "simulator":
        for url in upstream.split(","):
            normalise_base_url(url)
    if key_env is not None and not os.environ.get(key_env):
        raise SettingsError(f"--upstream-key-env names {key_env}, but that variable is not set")


def silent_upstreams(upstream: str) -> Iterator[str]:
    """What to tell the user of inference servers to which there is no connection. The job waits for them: a model may
    still be loading. Those that only a proxy reaches are not looked at.

    Args:
        upstream: as for `local_server`.
    """
    for url in [] if upstream == "simulator" or is_model(upstream) else upstream.split(","):
        server = Server(normalise_base_url(url))
        parts = urlsplit(server.base_url)
        if getproxies() and not server.is_local:
            continue
        try:
            socket.create_connection((parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)), 3.0).close()
        except OSError as error:
            yield f"No connection to the upstream {url} ({error.strerror or error}): the job waits for it. Is it there?"


class _Child:
    """A `batchery` subprocess that announces its address on stdout and logs to a file.

    Args:
        name: for messages.
        arguments: the command and its options.
        log: where its stderr goes; appended to.
        linked: have the kernel end it with this process, for a command that does not watch its stdin.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, *, linked: bool = False) -> None:
        self.name = name
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(  # noqa: S603 - our own program, no shell
                [sys.executable, "-m", "batchery", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # A Ctrl-C is for the client alone, which then stops its children in order.
                start_new_session=True,
                preexec_fn=_ends_with(os.getpid()) if linked else None,  # noqa: PLW1509 - it takes no lock
            )

    def address(self, announcement: str, patience: float = READY) -> str:
        """Wait until it says where it listens.

        Args:
            announcement: what stands before the address on its line.
            patience: seconds that it may take.
        """
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stdout = self.process.stdout
        assert stdout is not None

        def read() -> None:
            # Read on to the end, so that the child never blocks on a full pipe.
            for line in stdout:
                lines.put(line.decode("utf-8", "replace").strip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        deadline = time.monotonic() + patience
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                text = f"{self.name} did not say where it listens within {patience:.0f} s.{self.log_tail()}"
                raise SettingsError(text) from None
            if line is None:
                code = self.process.wait()
                raise SettingsError(f"{self.name} did not start ({_how(code)}).{self.log_tail()}")
            if line.startswith(announcement):
                return line.removeprefix(announcement)

    def log_tail(self) -> str:
        """The last lines of what this process logged, ready to be put after a message."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._log_start)
                last = deque(file, maxlen=TAIL)
        except OSError:
            return ""
        text = b"".join(last).decode("utf-8", "replace").rstrip()
        return f" The last lines of {self._log}:\n{text}" if text else f" Its log {self._log} is empty."

    def stop(self) -> None:
        """Ask it to end, and make it after `STOP` seconds."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def _ends_with(parent: int) -> Callable[[], None]:
    """What a child does before it becomes its program: ask the kernel to end it when its parent ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def link() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it had ended already
            os._exit(1)

    return link


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
