"""Splitting a multipart upload into its fields and its one file, whatever their order, while it arrives."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec
from multipart import (  # type: ignore[import-untyped]
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from batchery.wire.errors import BadRequest

FILE = "file"
"""The name of the part that is the file, where nothing else is said."""

MAX_PARTS = 32
MAX_FIELD = 1024
MAX_BOUNDARY = 200
MAX_FILENAME = 255
DEFAULT_FILENAME = "upload"


class Sink(Protocol):
    """Where the file's bytes go."""

    async def add(self, data: bytes) -> None:
        """The next bytes; waits when it has enough to do."""


class Form(msgspec.Struct):
    """What a form held besides the file's bytes.

    Attributes:
        fields: the text fields.
        filename: the file's, fit to be shown; None when there was no file.
    """

    fields: dict[str, str]
    filename: str | None = None


def boundary_of(content_type: str) -> str:
    """The boundary between the parts of a multipart body.

    Raises:
        BadRequest: the body is something else, or has no usable boundary.
    """
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data":
        found = f"not {kind[:64]!r}" if kind else "but there is no Content-Type"
        raise BadRequest(f"Send the body as multipart/form-data, {found}.", code="invalid_content_type")
    boundary: str = options.get("boundary", "")
    if not 0 < len(boundary) <= MAX_BOUNDARY:
        raise BadRequest(
            f"The Content-Type multipart/form-data needs a boundary of 1 to {MAX_BOUNDARY} characters.",
            code="invalid_content_type",
        )
    return boundary


async def read_form(
    chunks: AsyncIterator[bytes],
    boundary: str,
    sink: Sink,
    on_field: Callable[[str, str], None],
    *,
    file: str = FILE,
) -> Form:
    """Read a whole form.

    Args:
        chunks: the body as it arrives.
        boundary: from `boundary_of`.
        sink: takes the bytes of the part that is the file.
        on_field: told of each text field once it is complete, so that a wrong one ends the upload early.
        file: that part's name.

    Raises:
        BadRequest: the form is malformed or cut off, or a part stands twice or is too long.
    """
    form = Form({})
    try:
        with PushMultipartParser(boundary, max_segment_count=MAX_PARTS) as parser:
            part = _Part(form, file, sink, on_field)
            async for chunk in chunks:
                for event in parser.parse(chunk):
                    await part.take(event)
    except MultipartError as error:
        raise BadRequest(
            f"The multipart body is malformed or was cut off: {error}. Nothing was stored.", code="invalid_multipart"
        ) from None
    return form


class _Part:
    """The part that is being read just now."""

    def __init__(self, form: Form, file: str, sink: Sink, on_field: Callable[[str, str], None]) -> None:
        self._form = form
        self._file = file
        self._sink = sink
        self._on_field = on_field
        self._name = ""
        self._value = bytearray()

    async def take(self, event: MultipartSegment | bytes | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            if self._name != self._file:
                self._end_field()
        elif self._name == self._file:
            await self._sink.add(event)
        else:
            self._value += event
            if len(self._value) > MAX_FIELD:
                raise BadRequest(
                    f"The form field {self._name!r} is longer than {MAX_FIELD} bytes. The file itself belongs in the "
                    f"part named {self._file!r}.",
                    param=self._name,
                    code="invalid_value",
                )

    def _begin(self, part: MultipartSegment) -> None:
        self._name = (part.name or "")[:64]
        self._value.clear()
        if self._name == self._file:
            if self._form.filename is not None:
                raise BadRequest(
                    f"The form has two parts named {self._file!r}; send one at a time.",
                    param=self._file,
                    code="invalid_value",
                )
            self._form.filename = clean_filename(part.filename)
        elif self._name in self._form.fields:
            raise BadRequest(
                f"The form field {self._name!r} stands twice; give it once.", param=self._name, code="invalid_value"
            )

    def _end_field(self) -> None:
        try:
            value = self._value.decode()
        except UnicodeDecodeError:
            raise BadRequest(
                f"The form field {self._name!r} is not UTF-8.", param=self._name, code="invalid_value"
            ) from None
        self._form.fields[self._name] = value
        self._on_field(self._name, value)


def clean_filename(name: str | None) -> str:
    """A file name fit to be stored and shown: no folders, nothing unprintable, at most `MAX_FILENAME` characters."""
    base = re.split(r"[/\\]", name or "")[-1]
    printable = "".join(character for character in base if character.isprintable()).strip()
    return printable[:MAX_FILENAME] or DEFAULT_FILENAME
