"""`batchery status`: where batches are, once."""

from __future__ import annotations

from batchery.cli.failures import told
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer
from batchery.cli.tables import Format, FormatOption, show
from batchery.cli.targets import Targets, calling_for, find_batches, record_of, tell_saving
from batchery.client.objects import read_batch


def status(
    targets: Targets = None,
    *,
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Say where the batches of a job are, or those with these ids.

    \b
    Examples:
      batchery status results.jsonl
      batchery status batch_0123456789abcdef --server doubleword --format json
    """
    with told():
        found = find_batches(targets)
        with calling_for(found, base_url, server, api_key_env) as api:
            batches = [read_batch(api.get_batch(batch_id).value) for batch_id in found.ids]
        show([record_of(batch) for batch in batches], format)
        tell_saving(batches)
