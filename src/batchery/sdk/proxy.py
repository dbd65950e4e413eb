"""The proxy's HTTP app: chat completions, responses and embeddings as single requests, answered out of batches.

It is for programs of this machine that only take a base URL. It must not be usable from a page in a browser, which can
reach loopback too: such a page cannot send a JSON body here without asking first, and is never told that it may.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import msgspec
from litestar import Litestar, Request, Response, get, post
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, Receive

from batchery.client.answers import Answer, NoAnswerError
from batchery.client.errors import ApiError, ClientError
from batchery.client.gatherer import GATHERED, Gatherer
from batchery.client.http import Api
from batchery.wire.lines import MAX_LINE_BYTES

AnyRequest = Request[Any, Any, State]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_JSON = "application/json"


def create_proxy(gatherer: Gatherer, api: Api) -> ASGIApp:
    """The app.

    Args:
        gatherer: answers the requests.
        api: of the same server, for its models.
    """
    return Litestar(
        [gathered, models],
        state=State({"gatherer": gatherer, "api": api}),
        exception_handlers={Exception: _told},
        before_request=_refused,
        openapi_config=None,
        logging_config=None,
        request_max_body_size=MAX_LINE_BYTES,
    )


@post([path for url in GATHERED for path in (url, url.removeprefix("/v1"))])
async def gathered(request: AnyRequest) -> Response[bytes]:
    """Answer a request when its result lands."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        return refusal(
            415, "The body must be JSON, with the header Content-Type: application/json.", "unsupported_type"
        )
    url = "/v1/" + request.scope["path"].strip("/").removeprefix("v1/")
    body = await request.body()
    asking = asyncio.create_task(request.app.state.gatherer.send(url, body))
    leaving = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            return refusal(499, "The client went away.", "client_closed_request")
        answer: Answer = asking.result()
    except NoAnswerError as error:
        status = 503 if error.code == "closed" else 504 if error.is_timeout else 502
        return refusal(status, str(error), error.code)
    finally:
        asking.cancel()
        leaving.cancel()
    # Whatever may have helped was tried: a client that tried again would pay again.
    headers = {} if answer.status < 400 else {"x-should-retry": "false"}
    if answer.request_id:
        headers["x-request-id"] = answer.request_id
    return Response(answer.body, status_code=answer.status, media_type=_JSON, headers=headers)


@get(["/v1/models", "/models"])
async def models(request: AnyRequest) -> Response[bytes]:
    """The models of the batch server."""
    value, _ = await asyncio.to_thread(request.app.state.api.models)
    return Response(msgspec.json.encode(value), media_type=_JSON)


def refusal(status: int, message: str, code: str) -> Response[bytes]:
    """An answer in the form of the API's errors."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(
        msgspec.json.encode(error), status_code=status, media_type=_JSON, headers={"x-should-retry": "false"}
    )


async def _refused(request: AnyRequest) -> Response[bytes] | None:
    """Refuse what comes from a page in a browser, or by a name that some page has had point here."""
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    if host not in LOOPBACK or "origin" in request.headers:
        return refusal(403, "This proxy answers programs of this machine, and no pages in a browser.", "forbidden")
    return None


def _told(request: AnyRequest, error: Exception) -> Response[bytes]:
    """Any failure as an answer."""
    if isinstance(error, ApiError):
        return refusal(error.status, str(error), error.code or "error")
    if isinstance(error, ClientError):
        return refusal(502, str(error), "connection_lost")
    if isinstance(error, HTTPException):
        if error.status_code in (404, 405):
            paths = ", ".join(GATHERED)
            return refusal(
                error.status_code,
                f"This proxy takes POST on {paths}, and GET on /v1/models, not {request.method} {request.url.path}.",
                "not_found" if error.status_code == 404 else "method_not_allowed",
            )
        return refusal(error.status_code, str(error.detail), "invalid_request")
    return refusal(500, "The proxy failed at this request.", "internal_error")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
