"""The bodies of requests that are JSON, and the rules that they must pass.

A refusal names the field, its value and what would be accepted.
"""

from __future__ import annotations

import base64
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from batchery.wire import strict_json
from batchery.wire.errors import BadRequest
from batchery.wire.lines import URLS
from batchery.wire.objects import OnInvalidLine

MIN_EXPIRY = 3_600
MAX_EXPIRY = 2_592_000
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_URL = 2_048
MIN_SECRET = 16
MAX_SECRET = 256
SECRET_PREFIX = "whsec_"  # noqa: S105


class ExpiresAfter(msgspec.Struct, kw_only=True, frozen=True):
    """When a file may be deleted: so many seconds after its creation."""

    seconds: int
    anchor: Literal["created_at"] = "created_at"


class WebhookTarget(msgspec.Struct, kw_only=True, frozen=True):
    """Where a batch's end is told. Without a secret, the one of the caller's API key signs."""

    url: str
    secret: str | None = None


class CreateBatch(msgspec.Struct, kw_only=True, frozen=True):
    """The body of `POST /batches`, for the OpenAPI document; `parse_create_batch` reads it."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None
    on_invalid_line: OnInvalidLine = "fail"
    webhook: WebhookTarget | None = None
    deduplicate: bool = False


def parse_create_batch(data: bytes) -> CreateBatch:
    """Read and check the body of `POST /batches`. Whether the window is offered is for `windows.require_window`.

    Raises:
        BadRequest: names the field, its value and what would be accepted.
    """
    body = _object(data)
    return CreateBatch(
        input_file_id=_string(body, "input_file_id"),
        endpoint=_endpoint(body),
        completion_window=_string(body, "completion_window"),
        metadata=_metadata(body.get("metadata")),
        output_expires_after=_output_expires_after(body.get("output_expires_after")),
        on_invalid_line=_on_invalid_line(body.get("on_invalid_line")),
        webhook=_webhook(body.get("webhook")),
        deduplicate=_deduplicate(body.get("deduplicate")),
    )


class ValidateBatch(msgspec.Struct, kw_only=True, frozen=True):
    """The body of `POST /batches/validate`, for the OpenAPI document; `parse_validate_batch` reads it. That of
    `POST /batches` will do, too.

    Attributes:
        completion_window: null for the first that the server offers.
    """

    input_file_id: str
    endpoint: str | None = None
    completion_window: str | None = None
    on_invalid_line: OnInvalidLine = "fail"


def parse_validate_batch(data: bytes) -> ValidateBatch:
    """Read and check the body of `POST /batches/validate`, field by field as `parse_create_batch` does.

    Raises:
        BadRequest: names the field, its value and what would be accepted.
    """
    body = _object(data)
    return ValidateBatch(
        input_file_id=_string(body, "input_file_id"),
        endpoint=None if body.get("endpoint") is None else _endpoint(body),
        completion_window=None if body.get("completion_window") is None else _string(body, "completion_window"),
        on_invalid_line=_on_invalid_line(body.get("on_invalid_line")),
    )


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = strict_json.loads(data)
    except strict_json.NotJson as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if type(body) is not dict:
        raise BadRequest("The body must be a JSON object.", code="invalid_type")
    return body


def _string(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if value is None:
        raise BadRequest(f"The field {field!r} is required.", param=field, code="missing_required_parameter")
    if type(value) is not str or not value:
        raise BadRequest(
            f"{field} must be a non-empty string, not {strict_json.describe(value)}.", param=field, code="invalid_type"
        )
    return value


def _endpoint(body: dict[str, Any]) -> str:
    endpoint = _string(body, "endpoint")
    if endpoint not in URLS:
        raise BadRequest(
            f"endpoint {strict_json.describe(endpoint)} is not supported; use one of: {', '.join(URLS)}.",
            param="endpoint",
            code="invalid_value",
        )
    return endpoint


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise BadRequest(
            f"metadata must be an object of strings, not {strict_json.kind(value)}.",
            param="metadata",
            code="invalid_type",
        )
    if len(value) > MAX_METADATA:
        raise BadRequest(
            f"metadata has {len(value)} pairs; the most is {MAX_METADATA}.", param="metadata", code="invalid_value"
        )
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY:
            raise BadRequest(
                f"A metadata key has {len(key)} characters; the most is {MAX_METADATA_KEY}.",
                param="metadata",
                code="invalid_value",
            )
        if type(text) is not str:
            raise BadRequest(
                f"metadata[{key!r}] must be a string, not {strict_json.describe(text)}.",
                param=f"metadata.{key}",
                code="invalid_type",
            )
        if len(text) > MAX_METADATA_VALUE:
            raise BadRequest(
                f"metadata[{key!r}] has {len(text)} characters; the most is {MAX_METADATA_VALUE}.",
                param=f"metadata.{key}",
                code="invalid_value",
            )
    return value


def _on_invalid_line(value: Any) -> OnInvalidLine:
    if value is None or value == "fail":
        return "fail"
    if value == "skip":
        return "skip"
    raise BadRequest(
        f"on_invalid_line must be 'fail' (one bad line fails the batch) or 'skip' (the good lines run), not "
        f"{strict_json.describe(value)}.",
        param="on_invalid_line",
        code="invalid_value",
    )


def _deduplicate(value: Any) -> bool:
    if value is None or type(value) is bool:
        return value is True
    raise BadRequest(
        "deduplicate must be true (identical deterministic requests are sent once, and answered for all) or false, not "
        f"{strict_json.describe(value)}.",
        param="deduplicate",
        code="invalid_type",
    )


def _webhook(value: Any) -> WebhookTarget | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise BadRequest(
            f"webhook must be an object with url and secret, not {strict_json.kind(value)}.",
            param="webhook",
            code="invalid_type",
        )
    return WebhookTarget(url=check_webhook_url(value.get("url")), secret=check_webhook_secret(value.get("secret")))


def check_webhook_url(url: Any, param: str = "webhook.url") -> str:
    """Check the form of a webhook's URL; whether its host may be reached is the server's to decide.

    Raises:
        BadRequest: it is not an http or https URL with a host, or has a user name or a fragment.
    """

    def refused(reason: str) -> BadRequest:
        return BadRequest(
            f"{param} must be an http or https URL of at most {MAX_URL} characters, such as "
            f"https://example.com/hooks; {reason}.",
            param=param,
            code="invalid_value",
        )

    if type(url) is not str or not url:
        raise refused(f"this one is {strict_json.describe(url)}")
    if len(url) > MAX_URL:
        raise refused(f"this one has {len(url)}")
    if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        raise refused("this one has characters that must be percent-encoded")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise refused(f"this one cannot be read: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise refused(f"this one is {strict_json.describe(url)}")
    if parts.username is not None or parts.password is not None:
        raise refused("this one has a user name or a password in it")
    if parts.fragment:
        raise refused("this one has a fragment (#)")
    return url


def check_webhook_secret(secret: Any, param: str = "webhook.secret") -> str | None:
    """Check a webhook's signing secret, as Standard Webhooks has it: `whsec_` and base64, or any text as it is.

    Raises:
        BadRequest: it is too short to be safe, too long, or `whsec_` is followed by something that is not base64.
    """
    if secret is None:
        return None
    if type(secret) is not str or not MIN_SECRET <= len(secret) <= MAX_SECRET or not _is_kept(secret):
        raise BadRequest(  # the value is a secret and is not shown
            f"{param} must be {MIN_SECRET} to {MAX_SECRET} ASCII characters, such as whsec_ and base64, none of them "
            "U+0000.",
            param=param,
            code="invalid_value",
        )
    if secret.startswith(SECRET_PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except ValueError:
            key = b""
        if len(key) < MIN_SECRET:
            raise BadRequest(
                f"{param} begins with {SECRET_PREFIX} and must go on with the base64 of at least {MIN_SECRET} bytes.",
                param=param,
                code="invalid_value",
            )
    return secret


def _is_kept(secret: str) -> bool:
    return secret.isascii() and "\0" not in secret  # which no database keeps


def _output_expires_after(value: Any) -> ExpiresAfter | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise BadRequest(
            f"output_expires_after must be an object with anchor and seconds, not {strict_json.kind(value)}.",
            param="output_expires_after",
            code="invalid_type",
        )
    return check_expires_after(value.get("anchor"), value.get("seconds"), "output_expires_after")


def check_expires_after(anchor: Any, seconds: Any, param: str) -> ExpiresAfter:
    """Check an expiry rule.

    Args:
        anchor: must be `created_at`.
        seconds: a whole number from 3 600 to 2 592 000.
        param: the field's name, for the message.

    Raises:
        BadRequest: either is missing or not accepted.
    """
    if anchor != "created_at":
        raise BadRequest(
            f"{param}[anchor] must be 'created_at', not {strict_json.describe(anchor)}.",
            param=f"{param}.anchor",
            code="invalid_value",
        )
    if type(seconds) is not int or not MIN_EXPIRY <= seconds <= MAX_EXPIRY:
        raise BadRequest(
            f"{param}[seconds] must be a whole number from {MIN_EXPIRY} to {MAX_EXPIRY}, "
            f"not {strict_json.describe(seconds)}.",
            param=f"{param}.seconds",
            code="invalid_value",
        )
    return ExpiresAfter(seconds=seconds)
