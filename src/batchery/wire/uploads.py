"""A file that is uploaded in parts: the Uploads API's objects, and the bodies of its requests with their rules.

The objects are OpenAI's. Ours besides: `GET /uploads/{id}` lists the parts that are there, so that whoever was
interrupted can go on.
"""

from __future__ import annotations

import base64
import re
from typing import Any, Literal

import msgspec

from batchery.wire import ids, strict_json
from batchery.wire.bodies import ExpiresAfter, check_expires_after
from batchery.wire.errors import BadRequest
from batchery.wire.objects import FileObject

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]

MAX_PARTS = 10_000
MAX_NAME = 255

_HEX = re.compile(r"[0-9a-fA-F]{32}", re.ASCII)


class UploadObject(msgspec.Struct, kw_only=True):
    """A file that is uploaded in parts. `file` is there once it is completed, for as long as that file exists."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch"] = "batch"
    status: UploadStatus
    expires_at: int
    file: FileObject | None = None


class PartObject(msgspec.Struct, kw_only=True):
    """A part of it."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class StoredPart(PartObject, kw_only=True):
    """A part with what is needed to tell whether it is the right one."""

    bytes: int
    md5: str


class UploadWithParts(UploadObject, kw_only=True):
    """An upload and, while it is pending, its parts in the order in which they came."""

    parts: list[StoredPart]


class CreateUpload(msgspec.Struct, kw_only=True, frozen=True):
    """The body of `POST /uploads`, for the OpenAPI document; `parse_create_upload` reads it."""

    filename: str
    purpose: Literal["batch"]
    bytes: int
    mime_type: str
    expires_after: ExpiresAfter | None = None


class CompleteUpload(msgspec.Struct, kw_only=True, frozen=True):
    """The body of `POST /uploads/{id}/complete`; `parse_complete_upload` reads it."""

    part_ids: list[str]
    md5: str | None = None


def parse_create_upload(data: bytes) -> CreateUpload:
    """Read and check the body of `POST /uploads`. Whether it may be so large is for the server's limits.

    Raises:
        BadRequest: names the field, its value and what would be accepted.
    """
    body = _object(data)
    purpose = _text(body, "purpose")
    if purpose != "batch":
        raise BadRequest(
            f"purpose {strict_json.describe(purpose)} is not supported; use 'batch'.",
            param="purpose",
            code="invalid_value",
        )
    mime_type = _text(body, "mime_type")
    if len(mime_type) > MAX_NAME or not (mime_type.isascii() and mime_type.isprintable()):
        raise BadRequest(
            f"mime_type must be 1 to {MAX_NAME} printable ASCII characters, such as application/jsonl, not "
            f"{strict_json.describe(mime_type)}.",
            param="mime_type",
            code="invalid_value",
        )
    return CreateUpload(
        filename=_text(body, "filename"),
        purpose="batch",
        bytes=_size(body),
        mime_type=mime_type,
        expires_after=_expires_after(body.get("expires_after")),
    )


def parse_complete_upload(data: bytes) -> CompleteUpload:
    """Read and check the body of `POST /uploads/{id}/complete`.

    Returns:
        The body with bare ids, 32 hex digits each, and the MD5 as hex.

    Raises:
        BadRequest: names the field, its value and what would be accepted; also for an id that can be no part's, and
            for one that stands twice.
    """
    body = _object(data)
    given = body.get("part_ids")
    if given is None:
        raise BadRequest("The field 'part_ids' is required.", param="part_ids", code="missing_required_parameter")
    if type(given) is not list:
        raise BadRequest(
            f"part_ids must be an array of part ids, not {strict_json.describe(given)}.",
            param="part_ids",
            code="invalid_type",
        )
    if len(given) > MAX_PARTS:
        raise BadRequest(
            f"part_ids has {len(given)} ids; an upload has at most {MAX_PARTS} parts.",
            param="part_ids",
            code="invalid_value",
        )
    md5 = body.get("md5")
    return CompleteUpload(part_ids=_part_ids(given), md5=None if md5 is None else check_md5(md5, "md5"))


def _part_ids(given: list[Any]) -> list[str]:
    places: dict[str, int] = {}
    for place, text in enumerate(given):
        if type(text) is not str:
            raise BadRequest(
                f"part_ids[{place}] must be a string, not {strict_json.describe(text)}.",
                param=f"part_ids.{place}",
                code="invalid_type",
            )
        id = ids.parse("part", text)
        if id is None:
            raise no_such_part(text, place)
        if id in places:
            raise BadRequest(
                f"part_ids[{place}] is the same part as part_ids[{places[id]}], {ids.show('part', id)}; name each part "
                "once, in the order of the file. If the file has equal pieces, send each as a part of its own.",
                param=f"part_ids.{place}",
                code="invalid_value",
            )
        places[id] = place
    return list(places)


def no_such_part(id: str, place: int) -> BadRequest:
    """The answer to an id in `part_ids` that is no part of the upload.

    Args:
        id: as it was sent, or bare.
        place: in `part_ids`, from 0.
    """
    return BadRequest(
        f"part_ids[{place}], {strict_json.describe(id)}, is not a part of this upload. GET /uploads/{{id}} lists its "
        "parts. The upload stays pending; complete it with the right ids.",
        param=f"part_ids.{place}",
        code="unknown_part",
    )


def check_md5(value: Any, param: str) -> str:
    """An MD5 as hex in small letters, from hex, or from base64 as HTTP's Content-MD5 has it.

    Raises:
        BadRequest: it is neither.
    """
    if type(value) is str:
        if _HEX.fullmatch(value):
            return value.lower()
        try:
            digest = base64.b64decode(value, validate=True)
        except ValueError:
            digest = b""
        if len(digest) == 16:
            return digest.hex()
    raise BadRequest(
        f"{param} must be an MD5 of 32 hex digits, or its base64, not {strict_json.describe(value)}.",
        param=param,
        code="invalid_value",
    )


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = strict_json.loads(data)
    except strict_json.NotJson as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if type(body) is not dict:
        raise BadRequest("The body must be a JSON object.", code="invalid_type")
    return body


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if value is None:
        raise BadRequest(f"The field {field!r} is required.", param=field, code="missing_required_parameter")
    if type(value) is not str or not value:
        raise BadRequest(
            f"{field} must be a non-empty string, not {strict_json.describe(value)}.", param=field, code="invalid_type"
        )
    return value


def _size(body: dict[str, Any]) -> int:
    value = body.get("bytes")
    if value is None:
        raise BadRequest("The field 'bytes' is required.", param="bytes", code="missing_required_parameter")
    if type(value) is not int or value < 0:
        raise BadRequest(
            f"bytes must be the file's size, a whole number of at least 0, not {strict_json.describe(value)}.",
            param="bytes",
            code="invalid_type" if type(value) is not int else "invalid_value",
        )
    return value


def _expires_after(value: Any) -> ExpiresAfter | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise BadRequest(
            f"expires_after must be an object with anchor and seconds, not {strict_json.kind(value)}.",
            param="expires_after",
            code="invalid_type",
        )
    return check_expires_after(value.get("anchor"), value.get("seconds"), "expires_after")
