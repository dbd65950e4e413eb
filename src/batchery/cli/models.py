"""`batchery models`: what a server serves."""

from __future__ import annotations

from batchery.cli.failures import told
from batchery.cli.files import rows_of
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer, calling
from batchery.cli.tables import Format, FormatOption, show


def models(
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List the models that a server serves.

    \b
    Examples:
      batchery models --server doubleword
      batchery models --format json
    """
    with told(), calling(base_url, server, api_key_env) as api:
        rows = rows_of(api.models()[0])
        show([{"id": row.get("id"), "owned_by": row.get("owned_by")} for row in rows], format)
