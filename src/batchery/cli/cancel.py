"""`batchery cancel`: stopping batches; what is finished is kept, and can be fetched."""

from __future__ import annotations

import sys
import time

import typer

from batchery.cli.failures import told
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer
from batchery.cli.tables import Format, FormatOption, show
from batchery.cli.targets import Targets, calling_for, find_batches, record_of
from batchery.client.cancelling import cancelled
from batchery.client.errors import ClientError
from batchery.client.http import Api
from batchery.client.server import Server
from batchery.client.state import JobFolder

SECOND_THOUGHTS = 3.0  # seconds after a Ctrl-C in which another asks whether to cancel


def cancel(
    targets: Targets = None,
    *,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Cancel the batches of a job, or those with these ids. A batch that is over stays as it is.

    \b
    Examples:
      batchery cancel results.jsonl
      batchery cancel batch_0123456789abcdef --server doubleword
    """
    with told():
        found = find_batches(targets)
        with calling_for(found, base_url, server, api_key_env) as api:
            show([record_of(cancelled(api, batch_id)) for batch_id in found.ids], format)


def offer_to_cancel(server: Server, folder: JobFolder) -> None:
    """On a terminal, have a moment for second thoughts: another Ctrl-C asks whether the job's batches are to be
    cancelled.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    state = folder.load()
    ids = [part.batch_id for part in state.parts if part.batch_id is not None] if state else []
    if not ids:
        return
    try:
        typer.echo(f"Ctrl-C again within {SECOND_THOUGHTS:.0f} s asks whether to cancel what runs there.", err=True)
        time.sleep(SECOND_THOUGHTS)
        return
    except KeyboardInterrupt:
        pass
    batches = f"the batch {ids[0]}" if len(ids) == 1 else f"{len(ids)} batches"
    try:
        if not typer.confirm(f"\nCancel {batches}? What is finished is kept.", err=True):
            return
    except (KeyboardInterrupt, typer.Abort):
        return
    api = Api(server)
    try:
        for batch_id in ids:
            typer.echo(f"{batch_id}: {cancelled(api, batch_id).status}", err=True)
    except ClientError as error:
        typer.echo(f"Error: {error}", err=True)
    finally:
        api.close()
