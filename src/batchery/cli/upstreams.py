"""The upstreams that the settings name, ready to be sent to.

They are apart from the settings, which commands read that have no need of the engine and should not wait for it.
"""

from __future__ import annotations

import os

from batchery.cli.options import fail
from batchery.engine.pool import Destination
from batchery.server.settings import Settings
from batchery.upstreams.http import HttpUpstream, InvalidUpstreamError


def open_upstreams(settings: Settings) -> list[Destination]:
    """The upstreams that the settings name.

    Raises:
        typer.Exit: an address is not one, or a key's variable is empty, which has been said.
    """
    found: dict[str, Destination] = {}
    for one in settings.upstreams:
        key = None
        if one.key_env is not None:
            key = os.environ.get(one.key_env)
            if not key:
                fail(f"--upstream-key-env names {one.key_env}, but that environment variable is not set")
        try:
            upstream = HttpUpstream(one.url, key=key, timeout=settings.request_timeout, metrics=one.metrics)
        except InvalidUpstreamError as error:
            fail(str(error))
        if upstream.url in found:
            fail(f"--upstream {one.url} is named twice; name each inference server once")
        found[upstream.url] = Destination(
            upstream=upstream,
            name=upstream.url,
            max_in_flight=one.max_in_flight,
            requests_per_minute=one.requests_per_minute,
            tokens_per_minute=one.tokens_per_minute,
            yield_share=one.yield_share,
        )
    return list(found.values())
