"""`batchery batches`: the Batch API as it is, one call for each command."""

from __future__ import annotations

import uuid
from typing import Annotated

import typer

from batchery.cli.cost_report import checked_window
from batchery.cli.failures import told
from batchery.cli.files import rows_of
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, Deduplicate, NamedServer, calling
from batchery.cli.tables import Format, FormatOption, show
from batchery.cli.targets import record_of
from batchery.client.cancelling import cancelled
from batchery.client.errors import SettingsError
from batchery.client.making import CHAT
from batchery.client.objects import TAG, read_batch
from batchery.client.upload import NOT_DEDUPLICATED

EPILOG = """
Examples:

  batchery batches list --server doubleword

  batchery batches create file-0123456789abcdef --window 1h --metadata team=search

  batchery batches get batch_0123456789abcdef
"""

group = typer.Typer(help="List, show, create and cancel batches at a server.", no_args_is_help=True, epilog=EPILOG)

BatchId = Annotated[str, typer.Argument(metavar="BATCH_ID", help="The id of a batch.")]


@group.command("list")
def list_(
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="At most so many.")] = 20,
    after: Annotated[str | None, typer.Option(metavar="BATCH_ID", help="Those behind this one.")] = None,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List batches, the newest first."""
    query = {"limit": str(limit)} | ({"after": after} if after else {})
    with told(), calling(base_url, server, api_key_env) as api:
        rows = rows_of(api.call("GET", "/batches", "listing batches", query=query))
        show([record_of(read_batch(row)) for row in rows], format)


@group.command()
def get(
    batch_id: BatchId,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.JSON,
) -> None:
    """Show a batch."""
    with told(), calling(base_url, server, api_key_env) as api:
        value = api.get_batch(batch_id).value
        show([record_of(read_batch(value))], format, whole=value)


@group.command()
def create(
    file_id: Annotated[str, typer.Argument(metavar="FILE_ID", help="Of an uploaded input.")],
    window: Annotated[str, typer.Option(metavar="24h|1h|...", help="Time it may take.")] = "24h",
    endpoint: Annotated[str, typer.Option(metavar="PATH", help="The url of its requests.")] = CHAT,
    metadata: Annotated[list[str] | None, typer.Option(metavar="NAME=TEXT", help="May be repeated.")] = None,
    deduplicate: Deduplicate = False,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Create a batch of an uploaded file."""
    with told(), calling(base_url, server, api_key_env) as api:
        pairs = dict(_pair(text) for text in metadata or ())
        key = f"batch-{uuid.uuid4()}"
        batch = api.create_batch(
            file_id=file_id,
            endpoint=endpoint,
            window=checked_window(window),
            metadata={**pairs, TAG: key},
            key=key,
            tag=key,
            deduplicate=deduplicate,
        )
        if deduplicate and batch.deduplicated is None:
            typer.echo(NOT_DEDUPLICATED, err=True)
        show([record_of(batch)], format)


@group.command()
def cancel(
    batch_id: BatchId,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Cancel a batch; one that is over stays as it is."""
    with told(), calling(base_url, server, api_key_env) as api:
        show([record_of(cancelled(api, batch_id))], format)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or name == TAG:
        raise SettingsError(f"--metadata takes NAME=TEXT, with another name than {TAG}, not {text!r}")
    return name, value
