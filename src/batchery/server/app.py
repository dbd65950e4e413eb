"""The ASGI app: every route under both base paths, and the layer around them."""

from __future__ import annotations

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.types import ASGIApp

from batchery.server import openapi
from batchery.server.context import Context
from batchery.server.errors import to_response
from batchery.server.exchange import with_exchange
from batchery.server.routes import API, HEALTH

BASES = ("/v1", "/ai/v1")


def create_app(context: Context) -> ASGIApp:
    """The app.

    Args:
        context: what its handlers work with.
    """
    app = Litestar(
        [
            *(Router(base, route_handlers=API) for base in BASES),
            *HEALTH,
            openapi.serve_document,
            openapi.serve_page,
        ],
        state=State({"context": context}),
        exception_handlers={Exception: to_response},
        openapi_config=None,
        logging_config=None,
        request_max_body_size=None,
    )
    return with_exchange(app)
