"""What the commands about running jobs take: the output of a job, which knows its batches and its server, or the ids
of batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from batchery.cli.server_options import calling
from batchery.client.errors import SettingsError
from batchery.client.http import Api
from batchery.client.job import sum_deduplicated
from batchery.client.objects import Batch
from batchery.client.progress import saving
from batchery.client.receipt import load_receipt
from batchery.client.state import JobFolder

Targets = Annotated[
    list[str] | None, typer.Argument(metavar="OUT|BATCH_ID...", help="A job's output, or ids of batches.")
]


class Found(msgspec.Struct):
    """The batches that are meant.

    Attributes:
        ids: of them, in order.
        server: the base URL of the job's server; None where ids were named.
    """

    ids: list[str]
    server: str | None = None


def find_batches(targets: Sequence[str] | None) -> Found:
    """The batches of jobs and ids.

    Raises:
        SettingsError: none are named, there is no such job or it has none yet, or jobs are on different servers.
    """
    if not targets:
        raise SettingsError("name the output of a job, or the id of a batch; --help has examples")
    found = Found([])
    for target in targets:
        is_job = _has_job(Path(target))
        if not is_job and ("." in target or "/" in target):  # no id has these
            raise SettingsError(
                f"there is no job with the output {target}: what it knows of its batches is in the folder "
                f"{JobFolder(Path(target)).path.name} beside it. Name the output where it was made, or ids of batches"
            )
        ids, server = _of_job(Path(target)) if is_job else ([target], None)
        if server is not None and found.server not in (None, server):
            raise SettingsError(f"{target} runs on {server}, and others on {found.server}; ask for them one by one")
        found.server = server or found.server
        found.ids += ids
    return found


@contextmanager
def calling_for(found: Found, base_url: str | None, server: str | None, api_key_env: str | None) -> Iterator[Api]:
    """Calls to the server of batches: the job's own where none is named."""
    if found.server is not None and not found.server.startswith(("http://", "https://")):
        raise SettingsError(f"this job runs on {found.server}, which only lives while batchery run does")
    named = base_url or (found.server if server is None else None)
    with calling(named, server, api_key_env) as api:
        if found.server is not None and api.server.base_url != found.server:
            raise SettingsError(f"this job runs on {found.server}, and the command names {api.server.base_url}")
        yield api


def record_of(batch: Batch) -> dict[str, Any]:
    """A batch as a row of a table."""
    return {
        "id": batch.id,
        "status": batch.status,
        "total": batch.total,
        "completed": batch.completed,
        "failed": batch.failed,
        "window": batch.window,
        "created_at": moment(batch.created_at),
        "expires_at": moment(batch.expires_at),
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "deduplicated": None if batch.deduplicated is None else batch.deduplicated.requests,
    }


def tell_saving(batches: Sequence[Batch]) -> None:
    """Say on stderr what was saved in batches by sending identical requests once, if anything."""
    if (saved := saving(sum_deduplicated(batches))) is not None:
        typer.echo(f"Saved: {saved}", err=True)


def moment(seconds: int | None) -> str | None:
    """A time as ISO 8601 writes it, in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _has_job(path: Path) -> bool:
    folder = JobFolder(path.absolute())
    return folder.has_state or folder.receipt_path.exists()


def _of_job(path: Path) -> tuple[list[str], str]:
    folder = JobFolder(path.absolute())
    state = folder.load()
    if state is not None:
        ids = [part.batch_id for part in state.parts if part.batch_id is not None]
        if not ids:
            raise SettingsError(f"the job of {path} has no batch yet; run its command again")
        return ids, state.server
    receipt = load_receipt(folder)
    assert receipt is not None
    return receipt.batches, receipt.server
