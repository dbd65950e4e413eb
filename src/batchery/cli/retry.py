"""`batchery retry`: running what failed again, of a job or of a batch."""

from __future__ import annotations

from pathlib import Path

import msgspec
import typer

from batchery.cli.failures import told
from batchery.cli.jobs import run_job
from batchery.cli.request import Request
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer
from batchery.cli.tables import Format, FormatOption, show
from batchery.cli.targets import Targets, calling_for, find_batches, record_of
from batchery.client.errors import SettingsError
from batchery.client.job_request import load_request
from batchery.client.retry_batch import retry_batch
from batchery.client.state import JobFolder


def retry(
    targets: Targets = None,
    *,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Run again what failed. Of a job: what may yet succeed, once more than so far, and the output is made anew. Of a
    batch: everything that did not succeed, by the server itself where it can, else as a new batch, whose id is printed.

    \b
    Examples:
      batchery retry results.jsonl
      batchery retry batch_0123456789abcdef --server openai
    """
    with told():
        folders = [JobFolder(Path(target).absolute()) for target in targets or ()]
        job = next((folder for folder in folders if folder.has_state), None)
        if job is not None and len(folders) > 1:
            raise SettingsError("name one job at a time, or only ids of batches")
        if job is None:
            found = find_batches(targets)
            with calling_for(found, base_url, server, api_key_env) as api:
                show([record_of(retry_batch(api, batch_id)) for batch_id in found.ids], format)
            return
        state = job.load()
        assert state is not None
        request = msgspec.structs.replace(
            load_request(job, Request),
            retries=state.round + 1,
            as_json=format is Format.JSON,
        )
        if base_url or server or api_key_env:
            request = msgspec.structs.replace(request, base_url=base_url, server=server, api_key_env=api_key_env)
    raise typer.Exit(run_job(request))
