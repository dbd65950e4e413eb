"""What the scripts remember on disk: small JSON files that are whole after any crash, and a lock while one works.

It must never hold an API key.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from exits import StopError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def state_path(source: Path) -> Path:
    """Where the state of an input file's batch is: `requests.jsonl` has `requests.jsonl.batch.json`."""
    return Path(str(source) + ".batch.json")


def load(path: Path) -> Optional[Dict[str, Any]]:
    """A state; None where there is none.

    Raises:
        StopError: the file is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StopError("%s is not a state file (%s); move it away" % (path, error)) from None
    if not isinstance(value, dict) or value.get("version") != 1:
        raise StopError("%s is not a state file that this script can read; move it away" % path)
    return value


def save(path: Path, state: Dict[str, Any]) -> None:
    """Replace a state in one step, and return when it would outlive a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(dict(state, version=1), file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def forget_new(path: Path) -> None:
    """A command with --new has ended well: the next one makes another batch."""
    state = load(path)
    if state is not None and state.pop("new", None):
        save(path, state)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder would outlive a power cut, where the system can say so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(str(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep any other process from the same work; the lock goes with the process, however it ends.

    Args:
        path: the state file.

    Raises:
        StopError: another process is at it.
    """
    with path.with_name(path.name + ".lock").open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StopError("another process is working with %s; wait until it has ended" % path) from None
        yield
