"""How many tokens a request has, estimated without a tokenizer: one for each four bytes of its body, as Doubleword and
batchery's own server count them, but images, whose base64 says nothing about tokens, at a fixed number each.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

BYTES_PER_TOKEN = 4
IMAGE_TOKENS = 1_000
"""For one image; real models count from 85 to some thousands, by size."""

METHOD = (
    f"input: one token for each {BYTES_PER_TOKEN} bytes of the bodies, {IMAGE_TOKENS} for each image; "
    "no tokenizer is used"
)

_IMAGE = re.compile(rb'"data:image/[a-z0-9.+-]{1,32};base64,[^"]*"|"(?:image_url|input_image|image)"\s*[,}]')
_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_MOST = 1 << 40


class Tokens(msgspec.Struct, frozen=True):
    """Of one request.

    Attributes:
        input: estimated.
        images: how many of them are in it.
        limit: the most that its answer may have; None where it does not say.
    """

    input: int
    images: int
    limit: int | None


class _Body(msgspec.Struct):
    body: msgspec.Raw


class _Limits(msgspec.Struct):
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    max_tokens: Any = None


_read = msgspec.json.Decoder(_Body).decode
_read_limits = msgspec.json.Decoder(_Limits).decode


def count_tokens(line: bytes, url: str) -> tuple[bytes, Tokens]:
    """The body of a request, as it is in its line, and its tokens.

    Args:
        line: a good line of a batch file.
        url: where it goes.
    """
    body = bytes(_read(line).body)
    size, images = len(body), 0
    if b"image" in body:
        for match in _IMAGE.finditer(body):
            if match[0].startswith(b'"data:'):
                size -= len(match[0])
            else:
                images += 1
    limits = _read_limits(body)
    limit = None
    for name in _LIMITS:
        value = getattr(limits, name)
        if type(value) is int and 0 < value < _MOST:
            limit = value
            break
    return body, Tokens(size // BYTES_PER_TOKEN + images * IMAGE_TOKENS, images, limit)
