"""Images of rows: URLs as they are, files as data URLs. A file must lie in the folder that images may come from, be an
image by its bytes and not too large, so that a table from elsewhere cannot send just any file away.
"""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from batchery.client.requests import BadRow

MAX_IMAGE_BYTES = 7 * 1024 * 1024
"""As a data URL a third larger, which a line of 10 MiB still holds."""
MAX_IMAGES = 100

_REMOTE = ("http://", "https://", "data:image/")


def image_urls(value: Any, root: Path, *, limit: int = MAX_IMAGE_BYTES) -> list[str]:
    """The images that a row's value names.

    Args:
        value: a path or URL, or a list of them; nothing for no image.
        root: the folder that files must be in; relative paths are relative to it.
        limit: the most bytes of one file.

    Raises:
        BadRow: it is none of these, or a file is missing, outside, no image or too large.
    """
    if value is None or value == "":
        return []
    values = value if type(value) is list else [value]
    if len(values) > MAX_IMAGES:
        raise BadRow("invalid_image", f"a row may have {MAX_IMAGES} images, not {len(values)}")
    return [_url(item, root, limit) for item in values]


def encode_images(body: dict[str, Any], root: Path, *, limit: int = MAX_IMAGE_BYTES) -> None:
    """Put the local files that a finished request's body names as images into it, as data URLs.

    Raises:
        BadRow: as for `image_urls`.
    """
    for field in ("messages", "input"):
        messages = body.get(field)
        for message in messages if type(messages) is list else ():
            content = message.get("content") if type(message) is dict else None
            for part in content if type(content) is list else ():
                if type(part) is dict and part.get("type") in ("image_url", "input_image"):
                    image = part.get("image_url")
                    if type(image) is dict and type(image.get("url")) is str:
                        image["url"] = _url(image["url"], root, limit)
                    elif type(image) is str:
                        part["image_url"] = _url(image, root, limit)


def _url(value: Any, root: Path, limit: int) -> str:
    if type(value) is not str:
        raise BadRow("invalid_image", "an image must be a path or a URL")
    text = value.strip()
    if text.lower().startswith(_REMOTE):
        return text
    if text.lower().startswith("file:"):
        text = unquote(urlsplit(text).path)
    elif "://" in text or text.lower().startswith("data:"):
        raise BadRow("invalid_image", f"the image {text[:80]!r} is neither a file nor an http, https or data:image URL")
    return _data_url(_inside(text, root), text, limit)


def _inside(text: str, root: Path) -> Path:
    if "\0" in text:
        raise BadRow("invalid_image", "the path of an image contains U+0000")
    base = root.resolve()
    try:
        path = (base / text).resolve()
    except (OSError, RuntimeError):
        raise BadRow("invalid_image", f"the image {text[:80]!r} cannot be followed") from None
    if not path.is_relative_to(base):
        raise BadRow(
            "invalid_image",
            f"the image {text[:80]!r} lies outside {base}; name the folder that images may come from with --image-root",
        )
    return path


def _data_url(path: Path, name: str, limit: int) -> str:
    shown = repr(name[:80])
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise BadRow("invalid_image", f"the image {shown} does not exist") from None
    except OSError as error:
        raise BadRow("invalid_image", f"the image {shown} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise BadRow("invalid_image", f"the image {shown} is not a file")
        if found.st_size > limit:
            raise BadRow("invalid_image", f"the image {shown} has {found.st_size} bytes; the most is {limit}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(handle)
    kind = _kind_of(data)
    if kind is None:
        raise BadRow("invalid_image", f"{shown} is not an image: PNG, JPEG, GIF and WebP are known")
    if len(data) > limit:
        raise BadRow("invalid_image", f"the image {shown} has more than {limit} bytes")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _kind_of(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return None
