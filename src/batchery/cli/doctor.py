"""`batchery doctor`: whether the server that is named can be worked with, and if not, what is wrong."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import typer

from batchery.cli.exit_codes import OK, exit_code_of_error
from batchery.cli.failures import told
from batchery.cli.files import rows_of
from batchery.cli.server_options import ApiKeyEnv, BaseUrl, NamedServer, server_of
from batchery.cli.tables import Format, FormatOption, show
from batchery.client.errors import ClientError, NotFoundError
from batchery.client.http import Api
from batchery.client.inputs import megabytes
from batchery.client.limits import limits_named, server_name_of
from batchery.client.server import Server
from batchery.client.stored_servers import settings_path
from batchery.wire.windows import DEFAULT_WINDOWS

MOST_SKEW = 60.0  # seconds that clocks may differ before deadlines are in doubt


def doctor(
    base_url: BaseUrl = None,
    server: NamedServer = None,
    api_key_env: ApiKeyEnv = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Look whether everything is in order: settings, server, key, batches, limits, clock. It sends no request that
    could cost money.

    \b
    Examples:
      batchery doctor --server doubleword
      batchery doctor --base-url http://127.0.0.1:8080 --format json

    \b
    Exit codes:
      0  all in order
      1  the settings are wrong, or the server does not speak the API
      5  the server refused: key or quota
      6  the server cannot be reached
    """
    with told():
        found = server_of(base_url, server, api_key_env)
    records, code = examine(found, datetime.now(UTC))
    with told():
        show(records, format)
    raise typer.Exit(code)


def examine(server: Server, now: datetime) -> tuple[list[dict[str, Any]], int]:
    """What is in order and what is not, and the exit code.

    Args:
        server: which.
        now: by this machine's clock.
    """
    path = settings_path(os.environ)
    key = f"from {server.key_from}" if server.key_from else "none"
    records = [
        _record("settings file", "ok", str(path) if path.exists() else f"none at {path}"),
        _record("server", "ok", server.base_url),
        _record("key", "ok", key),
    ]
    api = Api(server)
    try:
        try:
            value, date = api.models()
            records.append(_record("reach and key", "ok", f"{len(rows_of(value))} models"))
            records.append(_clock(date, now))
        except NotFoundError:
            records.append(_record("reach and key", "ok", "the server lists no models"))
        rows = rows_of(api.call("GET", "/batches", "listing batches", query={"limit": "1"}))
        records.append(_record("batches", "ok", "can be listed" if rows else "can be listed; none so far"))
    except ClientError as error:
        records.append(_record("server's answer", "wrong", str(error)))
        return records, exit_code_of_error(error)
    finally:
        api.close()
    limits = limits_named(server_name_of(server.base_url))
    said = (
        f"{limits.requests} requests and {megabytes(limits.file_bytes)} a batch; windows {', '.join(DEFAULT_WINDOWS)}"
    )
    records.append(_record("limits", "ok", f"taken to be {said}"))
    return records, OK


def _clock(date: str | None, now: datetime) -> dict[str, Any]:
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return _record("clock", "unknown", "the server does not say its time")
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=UTC)
    skew = (now - theirs).total_seconds()
    if abs(skew) <= MOST_SKEW:
        return _record("clock", "ok", "as the server's, within a minute")
    ahead = "ahead of" if skew > 0 else "behind"
    return _record("clock", "wrong", f"{abs(skew):.0f} s {ahead} the server's; deadlines will be off")


def _record(check: str, state: str, detail: str) -> dict[str, Any]:
    return {"check": check, "state": state, "detail": detail}
