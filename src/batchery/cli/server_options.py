"""The options that name a server, and that ask more of it than the Batch API has, shared by the commands that talk to
one; and the calls to the one that they name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from batchery.client.http import Api
from batchery.client.server import Server, resolve_server
from batchery.client.stored_servers import stored_servers

BaseUrl = Annotated[
    str | None, typer.Option("--base-url", metavar="URL", help="The batch server, with or without /v1 at its end.")
]
NamedServer = Annotated[
    str | None,
    typer.Option("--server", metavar="NAME", help="A server of the settings file, or doubleword, or openai."),
]
ApiKeyEnv = Annotated[
    str | None, typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the server's key.")
]

Deduplicate = Annotated[
    bool,
    typer.Option(
        "--deduplicate", help="Send identical requests that leave nothing to chance once, on a server that can."
    ),
]


def server_of(base_url: str | None, server: str | None, api_key_env: str | None) -> Server:
    """The server that options, environment and settings file name, with its key.

    Raises:
        SettingsError: none is named, or something about it is wrong.
    """
    return resolve_server(base_url, api_key_env, os.environ, stored=stored_servers(os.environ), name=server)


@contextmanager
def calling(base_url: str | None, server: str | None, api_key_env: str | None) -> Iterator[Api]:
    """Calls to that server, for the length of the block."""
    api = Api(server_of(base_url, server, api_key_env))
    try:
        yield api
    finally:
        api.close()
