"""The schema that answers must follow: JSON Schema from a file or the command line, or a short form such as
`label: positive|negative, score: number, tags: string[]`, made fit for strict structured output.

Strict output, as OpenAI defines it, wants of every object that it allows no other properties and requires all that it
has; that is added where a schema does not say so, and a schema that says otherwise is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from batchery.client.errors import SettingsError
from batchery.wire import strict_json

MAX_SCHEMA_BYTES = 1024 * 1024
_TYPES = ("string", "number", "integer", "boolean")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", re.ASCII)
_UNFIT = re.compile(r"[^A-Za-z0-9_-]+", re.ASCII)
_INSIDE = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


def read_schema(text: str) -> tuple[str, dict[str, Any]]:
    """The schema that `--schema` means, and a name for it.

    Args:
        text: a path (with or without `@` before it), JSON Schema itself, or the short form.

    Raises:
        SettingsError: it is none of these, or cannot be strict.
    """
    text = text.strip()
    if text.startswith("{"):
        return "answer", strict(_parsed(text.encode(), "--schema"))
    path = Path(text.removeprefix("@"))
    if text.startswith("@") or text.endswith(".json") or (":" not in text and path.is_file()):
        try:
            with path.open("rb") as file:
                content = file.read(MAX_SCHEMA_BYTES + 1)
        except OSError as error:
            raise SettingsError(f"--schema {path}: {error.strerror}") from None
        if len(content) > MAX_SCHEMA_BYTES:
            raise SettingsError(f"--schema {path} is larger than {MAX_SCHEMA_BYTES} bytes")
        name = _UNFIT.sub("_", path.stem)[:64].strip("_") or "answer"
        return name, strict(_parsed(content, f"--schema {path}"))
    return "answer", short_form(text)


def short_form(text: str) -> dict[str, Any]:
    """The schema of the short form: `NAME: TYPE` with commas between. A type is `string`, `number`, `integer`,
    `boolean`, or the texts that may be answered with `|` between; `[]` after it makes a list, `?` allows null.

    Raises:
        SettingsError: names the part that is wrong.
    """
    properties: dict[str, Any] = {}
    for part in text.split(","):
        name, colon, kind = (piece.strip() for piece in part.partition(":"))
        if not colon or not _NAME.fullmatch(name):
            raise SettingsError(
                f"--schema: {part.strip()!r} is not NAME: TYPE, such as label: positive|negative; a file is named with "
                "@ before it"
            )
        if name in properties:
            raise SettingsError(f"--schema: {name!r} stands twice")
        properties[name] = _type(name, kind)
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _type(name: str, kind: str) -> dict[str, Any]:
    optional = kind.endswith("?")
    kind = kind.removesuffix("?").strip()
    if kind.endswith("[]"):
        inner = kind.removesuffix("[]").strip()
        if inner.startswith("(") and inner.endswith(")"):
            inner = inner[1:-1]
        made: dict[str, Any] = {"type": "array", "items": _type(name, inner)}
    elif "|" in kind:
        values = [value.strip() for value in kind.split("|")]
        if not all(values) or len(set(values)) != len(values):
            raise SettingsError(f"--schema: the values of {name!r} must differ, and none may be empty")
        made = {"type": "string", "enum": values}
    elif kind in _TYPES:
        made = {"type": kind}
    else:
        raise SettingsError(
            f"--schema: {kind!r} of {name!r} is no type; use {', '.join(_TYPES)}, or values with | between them"
        )
    if optional:
        if "enum" in made:
            made["enum"] = [*made["enum"], None]
        made["type"] = [made["type"], "null"]
    return made


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as strict output wants it.

    Raises:
        SettingsError: it cannot be that; the message names the place.
    """
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), dict):
        raise SettingsError("--schema must describe an object with properties at its top")
    made: dict[str, Any] = _strict(schema, "$")
    return made


def _strict(schema: Any, place: str) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    properties = made.get("properties")
    if made.get("type") == "object" or isinstance(properties, dict):
        if made.get("additionalProperties", False) is not False:
            raise SettingsError(
                f"--schema: {place} allows other properties, which strict output cannot; set additionalProperties to "
                "false, or use a list of name and value"
            )
        if not isinstance(properties, dict):
            raise SettingsError(f"--schema: {place} is an object without properties")
        made["additionalProperties"] = False
        made["required"] = list(properties)
    for key in _INSIDE:
        if isinstance(made.get(key), dict):
            made[key] = {name: _strict(inner, f"{place}.{name}") for name, inner in made[key].items()}
    for key in _LISTS:
        if isinstance(made.get(key), list):
            made[key] = [_strict(inner, f"{place}.{key}[{number}]") for number, inner in enumerate(made[key])]
    if "items" in made:
        made["items"] = _strict(made["items"], f"{place}[]")
    return made


def _parsed(content: bytes, source: str) -> dict[str, Any]:
    try:
        value = strict_json.loads(content)
    except strict_json.NotJson as error:
        raise SettingsError(f"{source} is not JSON: {error}") from None
    if type(value) is not dict:
        raise SettingsError(f"{source} must be a JSON object, not {strict_json.kind(value)}")
    if set(value) == {"name", "schema"} | (set(value) & {"strict", "description"}):  # as response_format has it
        value = value["schema"]
        if type(value) is not dict:
            raise SettingsError(f"{source}: schema must be an object, not {json.dumps(value)[:40]}")
    return value
