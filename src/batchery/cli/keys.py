"""`batchery keys`: make, list, change and revoke the API keys of a server, by writing to its database.

It works before the server has ever run and while it runs. What a script wants (the key, the list) goes to stdout and
what is for people to stderr; a key and a webhook secret are shown once, when they are made, and never again.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from batchery.server.settings import Settings
    from batchery.store.api_keys import KeyRow

T = TypeVar("T")

MAX_OWNER = 64
MAX_LIMIT = (1 << 63) - 1
NONE = "none"
"""What takes a limit or a webhook away."""

EPILOG = """
Examples:

  batchery keys create --data-dir /var/lib/batchery --owner ann > ann.key

  batchery keys list --format json

  batchery keys update key_0123456789abcdef0123456789abcdef --max-live-batches 10 --max-upload-bytes none

  batchery keys revoke key_0123456789abcdef0123456789abcdef

The database is found as batchery serve finds it: by these options, by BATCHERY_DATA_DIR and BATCHERY_DATABASE, or in
batchery.toml. A running server follows within a few seconds.
"""

group = typer.Typer(help="Make, list, change and revoke API keys.", no_args_is_help=True)


class ListFormat(StrEnum):
    """How keys are listed."""

    table = "table"
    json = "json"
    jsonl = "jsonl"


class KeyFormat(StrEnum):
    """How a new key is shown."""

    text = "text"
    json = "json"


DataDir = Annotated[
    Path | None, typer.Option(help="The server's data folder.", show_default="batchery-data", metavar="DIR")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="The server's database, if it is not the data folder's: postgresql://user@host/name."),
]
Config = Annotated[
    Path | None, typer.Option(help="The file with settings.", show_default="batchery.toml, if it is there")
]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="The key's id, as `keys list` shows it.")]
SecretEnv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The environment variable that holds the secret that the webhook is signed with."
    ),
]


def _new_limit(help: str) -> Any:
    return typer.Option(min=0, max=MAX_LIMIT, metavar="N", show_default="no limit", help=help)


def _limit(text: str) -> int | str:
    """A limit as `keys update` takes it."""
    if text == NONE:
        return NONE
    if text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_LIMIT:
        return int(text)
    raise typer.BadParameter(f"{text[:32]!r} is neither a whole number nor {NONE!r}")


def _changed_limit(help: str) -> Any:
    return typer.Option(parser=_limit, metavar=f"N|{NONE}", show_default="as it is", help=help)


QUEUED = "Requests that may wait or run at a time, over all the key's batches."
LIVE = "Batches that may be under way at a time."
BYTES = "Bytes that the files uploaded with the key may have together."
WEIGHT = (
    "The share of the capacity that its batches get where several owners want it at once, next to the others': "
    "2 gets twice what 1 gets."
)
MAX_WEIGHT = 1000


@group.command(epilog=EPILOG)
def create(
    owner: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Whose key it is. Keys with the same owner see the same files and batches, others see nothing of "
            "them. What was made before there were keys belongs to 'local'.",
        ),
    ] = "local",
    max_queued_requests: Annotated[int | None, _new_limit(QUEUED)] = None,
    max_live_batches: Annotated[int | None, _new_limit(LIVE)] = None,
    max_upload_bytes: Annotated[int | None, _new_limit(BYTES)] = None,
    weight: Annotated[int, typer.Option(min=1, max=MAX_WEIGHT, metavar="N", help=WEIGHT)] = 1,
    webhook_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where the end of the key's batches is told.")
    ] = None,
    webhook_secret_env: SecretEnv = None,
    output: Annotated[KeyFormat, typer.Option("--format", help="The key alone, or all about it.")] = KeyFormat.text,
    data_dir: DataDir = None,
    database: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Make a key, and show it: this once, on stdout.

    From the first key on, a server lets nobody in without one.
    """
    from batchery.cli import key_database  # noqa: PLC0415

    settings = _settings(config, data_dir, database)
    owner = _owner(owner)
    limits = {
        "max_queued_requests": max_queued_requests,
        "max_live_batches": max_live_batches,
        "max_upload_bytes": max_upload_bytes,
        "weight": weight,
    }
    url, secret, is_new = None, None, False
    if webhook_url is not None:
        url, secret = _webhook_url(webhook_url), _secret_from(webhook_secret_env)
        is_new = secret is None
        secret = secret or key_database.new_secret()
    elif webhook_secret_env is not None:
        _fail("--webhook-secret-env is of no use without --webhook-url")
    key, id = _run(key_database.create(settings, owner, limits | {"webhook_url": url, "webhook_secret": secret}))
    if output is KeyFormat.json:
        _print_json(
            {"id": id, "key": key, "owner": owner, **limits, "webhook_url": url}
            | ({"webhook_secret": secret} if is_new else {})
        )
    else:
        print(key)
    _say(
        f"{id} for owner {owner!r}, in {key_database.place(settings)}. "
        "The key is shown only now, and kept nowhere: store it."
    )
    _say("Clients send it as 'Authorization: Bearer sk-...'; those of OpenAI take it as OPENAI_API_KEY.")
    if is_new and output is KeyFormat.text:
        _say(f"The webhook's secret, shown only now: {secret}")


@group.command("list")
def list_(
    output: Annotated[
        ListFormat, typer.Option("--format", help="For people, one JSON array, or one JSON object a line.")
    ] = ListFormat.table,
    data_dir: DataDir = None,
    database: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """List all keys, also those that are revoked. The keys themselves are kept nowhere."""
    from batchery.cli import key_database  # noqa: PLC0415

    rows = _run(key_database.all_keys(_settings(config, data_dir, database)))
    if output is ListFormat.json:
        _print_json([_shown(row) for row in rows])
    elif output is ListFormat.jsonl:
        for row in rows:
            _print_json(_shown(row))
    else:
        _print_table(rows)


@group.command(epilog=EPILOG)
def update(
    key_id: KeyId,
    max_queued_requests: Annotated[Any, _changed_limit(QUEUED)] = None,
    max_live_batches: Annotated[Any, _changed_limit(LIVE)] = None,
    max_upload_bytes: Annotated[Any, _changed_limit(BYTES)] = None,
    weight: Annotated[
        int | None, typer.Option(min=1, max=MAX_WEIGHT, metavar="N", show_default="as it is", help=WEIGHT)
    ] = None,
    webhook_url: Annotated[
        str | None,
        typer.Option(
            metavar=f"URL|{NONE}", help="Where the end of batches made from now on is told.", show_default="as it is"
        ),
    ] = None,
    webhook_secret_env: SecretEnv = None,
    new_webhook_secret: Annotated[
        bool, typer.Option("--new-webhook-secret", help="Sign with a new secret, which is shown once, on stdout.")
    ] = False,
    data_dir: DataDir = None,
    database: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Change a key's limits or its webhook. The word none takes one away; what is not named stays as it is."""
    from batchery.cli import key_database  # noqa: PLC0415

    settings = _settings(config, data_dir, database)
    id = _key_id(key_id)
    given = {
        "max_queued_requests": max_queued_requests,
        "max_live_batches": max_live_batches,
        "max_upload_bytes": max_upload_bytes,
        "weight": weight,
    }
    changes: dict[str, Any] = {
        name: None if value == NONE else value for name, value in given.items() if value is not None
    }
    if new_webhook_secret and webhook_secret_env is not None:
        _fail("--new-webhook-secret and --webhook-secret-env say two things; give one of them")
    if webhook_url == NONE:
        if new_webhook_secret or webhook_secret_env is not None:
            _fail(f"there is nothing to sign with --webhook-url {NONE}")
        changes |= {"webhook_url": None, "webhook_secret": None}
    elif webhook_url is not None:
        changes["webhook_url"] = _webhook_url(webhook_url)
    secret = key_database.new_secret() if new_webhook_secret else _secret_from(webhook_secret_env)
    if secret is not None:
        changes["webhook_secret"] = secret
    if not changes:
        _fail("nothing to change was named; see 'batchery keys update --help'")
    made = _run(key_database.update(settings, id, changes)) or (secret if new_webhook_secret else None)
    if made is not None:
        print(made)
        _say("That is the webhook's new secret, shown only now.")
    _say(f"{_show(id)} is changed; a running server follows within a few seconds.")


@group.command(epilog=EPILOG)
def revoke(
    key_id: KeyId,
    data_dir: DataDir = None,
    database: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Revoke a key for good. What was made with it stays, and its batches go on."""
    from batchery.cli import key_database  # noqa: PLC0415

    settings = _settings(config, data_dir, database)
    id = _key_id(key_id)
    since = _run(key_database.revoke(settings, id))
    if since is None:
        _say(f"{_show(id)} is revoked; a running server refuses it within a few seconds.")
    else:
        _say(f"{_show(id)} has been revoked since {key_database.moment(since)}.")


def _settings(config: Path | None, data_dir: Path | None, database: str | None) -> Settings:
    from batchery.cli.options import read_settings  # noqa: PLC0415

    return read_settings(config, needs_upstream=False, data_dir=data_dir, database=database)


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def _owner(name: str) -> str:
    if not 0 < len(name) <= MAX_OWNER or not name.isprintable() or name != name.strip():
        _fail(
            f"--owner must have 1 to {MAX_OWNER} printable characters, with no space at either end, not "
            f"{name[:MAX_OWNER]!r}"
        )
    return name


def _key_id(text: str) -> str:
    """The bare id of a key."""
    from batchery.wire import ids  # noqa: PLC0415

    id = ids.parse("key", text)
    if id is None:
        if text.startswith("sk-"):  # not repeated: it may be a key
            _fail("KEY_ID is a key's id, such as key_ and 32 digits, and not the key itself; see 'batchery keys list'")
        _fail(f"{text[:80]!r} is not the id of a key, which is key_ and 32 digits; see 'batchery keys list'")
    return id


def _show(id: str) -> str:
    from batchery.wire import ids  # noqa: PLC0415

    return ids.show("key", id)


def _webhook_url(url: str) -> str:
    from batchery.wire.bodies import check_webhook_url  # noqa: PLC0415
    from batchery.wire.errors import BadRequest  # noqa: PLC0415

    try:
        return check_webhook_url(url, "--webhook-url")
    except BadRequest as error:
        _fail(error.message)


def _secret_from(name: str | None) -> str | None:
    """The webhook secret in an environment variable; None for no variable."""
    from batchery.wire.bodies import check_webhook_secret  # noqa: PLC0415
    from batchery.wire.errors import BadRequest  # noqa: PLC0415

    if name is None:
        return None
    secret = os.environ.get(name)
    if not secret:
        _fail(f"--webhook-secret-env names {name}, but that environment variable is not set")
    try:
        return check_webhook_secret(secret, name)
    except BadRequest as error:
        _fail(error.message)


def _shown(row: KeyRow) -> dict[str, Any]:
    return {
        "id": _show(row.id),
        "owner": row.owner,
        "hint": row.hint,
        "created_at": row.created_at,
        "revoked_at": row.revoked_at,
        "max_queued_requests": row.max_queued_requests,
        "max_live_batches": row.max_live_batches,
        "max_upload_bytes": row.max_upload_bytes,
        "weight": row.weight,
        "webhook_url": row.webhook_url,
    }


def _print_json(value: Any) -> None:
    import msgspec  # noqa: PLC0415

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def _print_table(rows: list[KeyRow]) -> None:
    from rich.cells import cell_len  # noqa: PLC0415

    from batchery.cli import key_database  # noqa: PLC0415

    if not rows:
        _say("There are no keys yet.")
        return
    head = ["ID", "OWNER", "KEY", "CREATED", "REVOKED", "REQUESTS", "BATCHES", "BYTES", "WEIGHT", "WEBHOOK"]
    lines = [
        [
            _show(row.id),
            row.owner,
            f"sk-...{row.hint}",
            key_database.moment(row.created_at),
            "-" if row.revoked_at is None else key_database.moment(row.revoked_at),
            *(
                "-" if limit is None else str(limit)
                for limit in (row.max_queued_requests, row.max_live_batches, row.max_upload_bytes)
            ),
            str(row.weight),
            row.webhook_url or "-",
        ]
        for row in rows
    ]
    widths = [max(map(cell_len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        print(
            "  ".join(text + " " * (width - cell_len(text)) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def _say(text: str) -> None:
    typer.echo(f"batchery: {text}", err=True)


def _fail(message: str) -> NoReturn:
    from batchery.cli.options import fail  # noqa: PLC0415

    fail(message)
