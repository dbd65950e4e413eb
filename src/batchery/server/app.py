"""The ASGI app: every route under both base paths, behind the guard that asks for a key, and the layer around them."""

from __future__ import annotations

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.types import ASGIApp

from batchery.server import openapi, openapi_page
from batchery.server.auth import Keyring, require_key
from batchery.server.context import Context
from batchery.server.errors import to_response
from batchery.server.exchange import with_exchange
from batchery.server.metrics import Metrics
from batchery.server.places import Downloads, Uploads
from batchery.server.routes import API, HEALTH
from batchery.server.watch import Hub

BASES = ("/v1", "/ai/v1")


def create_app(context: Context) -> ASGIApp:
    """The app.

    Args:
        context: what its handlers work with.
    """
    metrics = Metrics(context.database)
    state = State(
        {
            "context": context,
            "keyring": Keyring(context.database, may_be_open=context.may_be_open),
            "uploads": Uploads(context.max_uploads),
            "downloads": Downloads(context.max_downloads),
            "hub": Hub(context.database, context.stopping),
            "metrics": metrics,
        }
    )
    app = Litestar(
        [
            *(Router(base, route_handlers=API, guards=[require_key]) for base in BASES),
            *HEALTH,
            openapi.serve_document,
            openapi_page.serve_page,
        ],
        state=state,
        exception_handlers={Exception: to_response},
        openapi_config=None,
        logging_config=None,
        request_max_body_size=None,
    )
    return with_exchange(app, metrics.traffic)
