"""The official client whose chat, responses and embeddings calls are gathered into batches and awaited.

Everything else goes straight through. An error is the official exception, with the status and body that the model's
server answered; a request is never sent both ways.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from batchery.client.answers import Answer, NoAnswerError
from batchery.client.gatherer import GATHERED, Gatherer
from batchery.client.server import Server, normalise_base_url
from batchery.sdk.client import server_for
from batchery.sdk.errors import in_words_of_programs

try:
    import openai
except ImportError:
    raise ImportError("batchery.AsyncOpenAI needs the official client: pip install 'batchery[openai]'") from None


NO_KEY = "none"
"""What the official client is given where a server takes everybody; it insists on a key."""


class Batching:
    """How calls are gathered.

    Attributes:
        window: the completion window of the batches.
        seconds: how long a call waits for others.
        requests: how many make a batch at once; None for as many as the server takes.
        retries: how often those that may yet succeed are run again.
        batches: how many may run at a time; while there are so many, calls go on gathering.
    """

    def __init__(
        self,
        *,
        window: str = "24h",
        seconds: float = 1.0,
        requests: int | None = None,
        retries: int = 2,
        batches: int = 16,
    ) -> None:
        self.options: dict[str, Any] = {
            "window": window,
            "seconds": seconds,
            "requests": requests,
            "retries": retries,
            "batches": batches,
        }
        self.gatherer: Gatherer | None = None
        self.loop: asyncio.AbstractEventLoop | None = None


class AsyncOpenAI(openai.AsyncOpenAI):
    """`openai.AsyncOpenAI`, with batches behind `chat.completions.create`, `responses.create` and `embeddings.create`.

    A call returns when its result lands, at most a window later. A timeout that is given is heeded, and the official
    default of ten minutes is not. Cancelling a call takes it out of its batch.

    Args:
        base_url, api_key: of the batch server; None for what the environment or the settings file names.
        window: the completion window of the batches.
        gather_seconds: how long a call waits for others.
        gather_requests: how many make a batch at once; None for as many as the server takes.
        max_batches: how many may run at a time; while there are so many, calls go on gathering.
        max_retries: how often a request that may yet succeed is run again.
        options: further arguments of the official client.

    Raises:
        SettingsError: no server is named anywhere, or something about it is wrong.
    """

    def __init__(
        self,
        *,
        base_url: str | Any | None = None,
        api_key: Any | None = None,
        window: str = "24h",
        gather_seconds: float = 1.0,
        gather_requests: int | None = None,
        max_batches: int = 16,
        max_retries: int = 2,
        batching: Batching | None = None,
        **options: Any,
    ) -> None:
        with in_words_of_programs():
            found = server_for(None if base_url is None else str(base_url), api_key if type(api_key) is str else None)
        options.setdefault("timeout", None)
        super().__init__(
            base_url=found.base_url,
            api_key=api_key if api_key is not None else found.api_key or NO_KEY,
            max_retries=max_retries,
            **options,
        )
        self._batching = batching or Batching(
            window=window,
            seconds=gather_seconds,
            requests=gather_requests,
            retries=max_retries,
            batches=max_batches,
        )

    def copy(self, *, _extra_kwargs: Mapping[str, Any] = {}, **options: Any) -> AsyncOpenAI:
        """A client with some options changed. It gathers together with this one, unless server or key are others."""
        shared = {} if options.get("base_url") or options.get("api_key") else {"batching": self._batching}
        made: Any = super().copy(_extra_kwargs={**shared, **_extra_kwargs}, **options)
        assert isinstance(made, AsyncOpenAI)
        return made

    with_options = copy

    async def close(self) -> None:
        """Close: calls that wait fail, and their batches are cancelled, since nobody could be given the answers."""
        if self._batching.gatherer is not None:
            await self._batching.gatherer.close()
        await super().close()

    async def request(self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
        """Send a request, as the official client does; gather it if it can wait."""
        url = self._gathered(options)
        if url is None:
            return await super().request(cast_to, options, stream=stream, stream_cls=stream_cls)
        body = options.json_data if isinstance(options.json_data, Mapping) else {}
        if stream or body.get("stream"):
            raise openai.OpenAIError(
                "stream=True cannot be had from a batch: results come whole. Leave it out, or use openai.AsyncOpenAI"
            )
        cast_to = self._maybe_override_cast_to(cast_to, options)
        options = await self._prepare_options(options)
        request: Any = self._build_request(options)
        await self._prepare_request(request)
        response = _response(request, await self._answer(request, url))
        if response.status_code >= 400:
            raise self._make_status_error_from_response(response)
        return await self._process_response(
            cast_to=cast_to, options=options, response=response, stream=False, stream_cls=None, retries_taken=0
        )

    def _gathered(self, options: Any) -> str | None:
        """The endpoint, if the request is for one whose requests are gathered."""
        path = urlsplit(str(options.url)).path
        if options.method.lower() != "post" or options.files or "://" in str(options.url):
            return None
        return next((url for url in GATHERED if path.strip("/") == url.removeprefix("/v1/")), None)

    async def _answer(self, request: Any, url: str) -> Answer:
        timeout = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(timeout):
                return await self._gatherer(request).send(url, request.content)
        except TimeoutError:
            raise openai.APITimeoutError(request=request) from None
        except NoAnswerError as error:
            if error.is_timeout:
                raise openai.APITimeoutError(request=request) from error
            raise openai.APIConnectionError(message=str(error), request=request) from error

    def _gatherer(self, request: Any) -> Gatherer:
        batching, loop = self._batching, asyncio.get_running_loop()
        if batching.gatherer is None or batching.loop is not loop:
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            has_key = kind.lower() == "bearer" and key != NO_KEY
            server = Server(normalise_base_url(str(self.base_url)), key if has_key else None, "api_key")
            with in_words_of_programs():
                batching.gatherer, batching.loop = Gatherer(server, **batching.options), loop
        return batching.gatherer


def _response(request: Any, answer: Answer) -> Any:
    """An answer as the HTTP library of the official client has it."""
    library = importlib.import_module(type(request).__module__.partition(".")[0])
    headers = {"content-type": "application/json"}
    if answer.request_id:
        headers["x-request-id"] = answer.request_id
    return library.Response(answer.status, headers=headers, content=answer.body, request=request)
