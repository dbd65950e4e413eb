"""`Idempotency-Key`: the same key and content give the same object, also when the answer to the first try was lost.

The header's rule is the IETF draft's (draft-ietf-httpapi-idempotency-key-header): a key that comes with other content
than before is a conflict.
"""

from __future__ import annotations

import hashlib

import msgspec

from batchery.server.context import AnyRequest
from batchery.store.idempotency import Made, Use
from batchery.wire.errors import BadRequest, Conflict

HEADER = "Idempotency-Key"
MAX_KEY = 255

_encode = msgspec.msgpack.Encoder(order="sorted").encode  # the order of keys in JSON means nothing


def key_of(request: AnyRequest) -> str | None:
    """The caller's idempotency key; None when there is none.

    Raises:
        BadRequest: it is empty, too long, not printable ASCII, or there are several.
    """
    values = request.headers.getall(HEADER, [])
    if not values:
        return None
    key = values[0]
    if len(set(values)) > 1 or not 0 < len(key) <= MAX_KEY or not (key.isascii() and key.isprintable()):
        raise BadRequest(
            f"{HEADER} must be given once, with 1 to {MAX_KEY} printable ASCII characters.",
            param=HEADER,
            code="invalid_value",
        )
    return key


def fingerprint(*content: object) -> str:
    """SHA-256, as hex, of what is asked for; equal content has an equal one, whatever its framing was.

    Args:
        content: numbers, texts, None, and lists, dicts and structs of these.
    """
    return hashlib.sha256(_encode(content)).hexdigest()


def same(made: Made, use: Use) -> str:
    """The bare id of the object that a key has made before.

    Raises:
        Conflict: it was used for other content.
    """
    if made.fingerprint != use.fingerprint:
        raise Conflict(
            f"This {HEADER} was used within the last 24 hours for other content. Use a new key for a new {use.kind}.",
            param=HEADER,
            code="idempotency_key_reused",
        )
    return made.object_id
