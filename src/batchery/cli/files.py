"""`batchery files`: the Files API as it is, one call for each command."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from batchery.cli.failures import told
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer, calling
from batchery.cli.tables import Format, FormatOption, show
from batchery.cli.targets import moment
from batchery.client.errors import SettingsError, UnexpectedAnswerError
from batchery.client.inputs import open_input

EPILOG = """
Examples:

  batchery files list --server doubleword

  batchery files upload requests.jsonl --format json

  batchery files content file-0123456789abcdef > results.jsonl
"""

group = typer.Typer(help="List, show, upload, fetch and delete files at a server.", no_args_is_help=True, epilog=EPILOG)

FileId = Annotated[str, typer.Argument(metavar="FILE_ID", help="The id of a file.")]


@group.command("list")
def list_(
    purpose: Annotated[str | None, typer.Option(metavar="batch|batch_output|...", help="Only these.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many.")] = 100,
    after: Annotated[str | None, typer.Option(metavar="FILE_ID", help="Those behind this one.")] = None,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List files, the newest first."""
    query = {"limit": str(limit)}
    query |= {name: text for name, text in (("purpose", purpose), ("after", after)) if text}
    with told(), calling(base_url, server, api_key_env) as api:
        rows = rows_of(api.call("GET", "/files", "listing files", query=query))
        show([_record(row) for row in rows], format)


@group.command()
def get(
    file_id: FileId,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.JSON,
) -> None:
    """Show what a server knows of a file."""
    with told(), calling(base_url, server, api_key_env) as api:
        value = api.call("GET", f"/files/{quote(file_id, safe='')}", "asking for the file")
        show([_record(value)], format, whole=value)


@group.command()
def content(
    file_id: FileId,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
) -> None:
    """Write a file's bytes to stdout."""
    with told(), calling(base_url, server, api_key_env) as api, api.content(file_id) as found:
        for chunk in found.chunks():
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


@group.command()
def upload(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file; only JSONL of finished requests can become a batch.")
    ],
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Upload a file with the purpose batch. It is sent as it is: `batchery check` looks at it before."""
    with told(), calling(base_url, server, api_key_env) as api:
        with open_input(path) as file:
            size = file.seek(0, 2)
        if not size:
            raise SettingsError(f"the file {path} is empty")
        file_id = api.upload(path.name, size, lambda: open_input(path), f"upload-{uuid.uuid4()}", lambda _: None)
        show([{"id": file_id, "filename": path.name, "bytes": size}], format)


@group.command()
def delete(
    file_ids: Annotated[list[str], typer.Argument(metavar="FILE_ID...", help="Their ids.")],
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Delete files."""
    with told(), calling(base_url, server, api_key_env) as api:
        for file_id in file_ids:
            api.call("DELETE", f"/files/{quote(file_id, safe='')}", "deleting the file")
        show([{"id": file_id, "deleted": True} for file_id in file_ids], format)


def rows_of(value: Any) -> list[dict[str, Any]]:
    """The rows of a list that a server gave.

    Raises:
        UnexpectedAnswerError: it is none.
    """
    rows = value if isinstance(value, list) else value.get("data") if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise UnexpectedAnswerError("the server's answer is not a list")
    return [row for row in rows if isinstance(row, dict)]


def _record(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnexpectedAnswerError("the server's answer is not a file")
    created = value.get("created_at")
    return {
        "id": value.get("id"),
        "filename": value.get("filename"),
        "purpose": value.get("purpose"),
        "bytes": value.get("bytes"),
        "status": value.get("status"),
        "created_at": moment(created) if isinstance(created, int) else created,
    }
