"""The schema that answers must follow, as a program names it: a model of pydantic, JSON Schema, or the short form; and
an answer read by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from batchery.client.errors import SettingsError
from batchery.client.schema import read_schema, strict

_UNFIT = re.compile(r"[^A-Za-z0-9_-]+", re.ASCII)


def is_model(schema: Any) -> bool:
    """Whether it is a class of pydantic's."""
    return isinstance(schema, type) and hasattr(schema, "model_json_schema")


def schema_of(schema: Any) -> tuple[str, dict[str, Any] | None]:
    """The name and the strict JSON Schema that are meant; `answer` and None for none.

    Raises:
        SettingsError: it is nothing that describes an answer.
    """
    if schema is None:
        return "answer", None
    if is_model(schema):
        name = _UNFIT.sub("_", schema.__name__)[:64].strip("_") or "answer"
        return name, strict(schema.model_json_schema())
    if isinstance(schema, str):
        return read_schema(schema)
    if isinstance(schema, Mapping):
        return "answer", strict(dict(schema))
    raise SettingsError(
        f"schema is a pydantic model, a JSON Schema, or a short form such as 'label: yes|no', not {schema!r}"
    )


def parse(text: str, schema: Any) -> tuple[Any, str | None]:
    """An answer's text as what the schema says: an object of the model, or what its JSON holds.

    Args:
        text: of the answer.
        schema: as it was named.

    Returns:
        The value, and None; or None, and why it cannot be read.
    """
    try:
        if is_model(schema):
            return schema.model_validate_json(text), None
        return msgspec.json.decode(text), None
    except ValueError as error:  # pydantic's and msgspec's both are
        return None, str(error)
    except RecursionError:  # a model that repeats "[" to its last token
        return None, "the answer is nested too deeply"
