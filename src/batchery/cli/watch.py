"""`batchery watch`: following batches to their end, without fetching anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from batchery.cli.exit_codes import BATCH_FAILED, OK, SOME_FAILED
from batchery.cli.failures import told
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer
from batchery.cli.tables import Format, FormatOption, show
from batchery.cli.targets import Targets, calling_for, find_batches, record_of, tell_saving
from batchery.client.job import Progress
from batchery.client.objects import Batch
from batchery.client.progress import display_for
from batchery.client.watching import follow_batches


def watch(
    targets: Targets = None,
    *,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Follow the batches of a job, or those with these ids, until they are over. It changes nothing.

    \b
    Examples:
      batchery watch results.jsonl
      batchery watch batch_0123456789abcdef --server doubleword

    \b
    Exit codes:
      0  completed, and every request succeeded
      3  completed, and some requests failed
      4  a batch failed, expired or was cancelled
      5  the server refused: key or quota
      6  connection lost
    """
    with told():
        found = find_batches(targets)
        display = display_for(sys.stderr, quiet=False)
        known: dict[int, Batch] = {}

        def heard(number: int, batch: Batch) -> None:
            known[number] = batch
            display.update(progress_of(list(known.values())))

        try:
            with calling_for(found, base_url, server, api_key_env) as api:
                batches = follow_batches(api, found.ids, heard)
        finally:
            display.close()
        show([record_of(batch) for batch in batches], format)
        tell_saving(batches)
    raise typer.Exit(code_of(batches))


def progress_of(batches: Sequence[Batch]) -> Progress:
    """Where batches are, together."""
    live = [batch for batch in batches if not batch.terminal]
    return Progress(
        (live or batches)[0].status,
        sum(batch.total for batch in batches),
        completed=sum(batch.completed for batch in batches),
        failed=sum(batch.failed for batch in batches),
        finished=not live,
    )


def code_of(batches: Sequence[Batch]) -> int:
    """The exit code for batches that are over."""
    if any(batch.status != "completed" for batch in batches):
        return BATCH_FAILED
    return SOME_FAILED if any(batch.failed for batch in batches) else OK
