"""`batchery results`: the result lines that batches have by now."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from batchery.cli.exit_codes import OK
from batchery.cli.failures import told
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer
from batchery.cli.targets import Targets, calling_for, find_batches
from batchery.cli.watch import code_of
from batchery.client.errors import SettingsError
from batchery.client.watching import Fetching


def results(
    targets: Targets = None,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where they go.", show_default="stdout")
    ] = None,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
) -> None:
    """Print the result lines that batches have by now: of those that succeeded, and, once a batch is over, of those
    that failed. A server without early results has none before the end.

    \b
    Examples:
      batchery results batch_0123456789abcdef --server openai -o results.jsonl
      batchery results results.jsonl | head

    \b
    Exit codes:
      0  all fetched, or the batch still runs
      3  some requests failed
      4  a batch failed, expired or was cancelled
      5  the server refused: key or quota
      6  connection lost
    """
    with told():
        found = find_batches(targets)
        if output is not None and output.exists():
            raise SettingsError(f"{output} exists already; move it away")
        with (
            tempfile.TemporaryDirectory(prefix="batchery-results-") as folder,
            calling_for(found, base_url, server, api_key_env) as api,
        ):
            file: BinaryIO = sys.stdout.buffer if output is None else output.open("xb")
            fetching = Fetching(api, found.ids, Path(folder), file.write)
            try:
                batches = fetching.now()
            except BaseException:
                if output is not None:  # a part of the lines would pass for all of them, and be in the way
                    output.unlink()
                raise
            finally:
                fetching.close()
                file.flush()
                if output is not None:
                    file.close()
        live = [batch for batch in batches if not batch.terminal]
        if live:
            typer.echo(
                f"{len(live)} still running: {live[0].completed} of {live[0].total} done in {live[0].id}", err=True
            )
    raise typer.Exit(OK if live else code_of(batches))
