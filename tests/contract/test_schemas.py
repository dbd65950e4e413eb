"""Our OpenAPI document against OpenAI's: for the objects that both have, as the official SDK's types have them."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Batch, FileDeleted, FileObject, Upload
from openai.types.batch_error import BatchError
from openai.types.batch_request_counts import BatchRequestCounts
from openai.types.batch_usage import BatchUsage
from openai.types.model import Model
from openai.types.uploads import UploadPart
from pydantic import BaseModel

from batchery.server.openapi import document

SHARED: dict[str, type[BaseModel]] = {
    "BatchObject": Batch,
    "BatchError": BatchError,
    "RequestCounts": BatchRequestCounts,
    "BatchUsage": BatchUsage,
    "FileObject": FileObject,
    "DeletedFile": FileDeleted,
    "UploadObject": Upload,
    "PartObject": UploadPart,
    "Model": Model,
}
WIDER = {
    # What we allow and OpenAI does not name: theirs is typed for static checkers, and the SDK takes any text.
    ("FileObject", "purpose"): {"batch_error"},
}

LEFT_OUT = {("Model", "shutdown_date")}  # an upstream does not say


def resolved(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """A schema, or what it refers to."""
    if "$ref" in schema:
        return resolved(defs[schema["$ref"].rsplit("/", 1)[-1]], defs)
    if len(schema.get("allOf", ())) == 1:
        return resolved(schema["allOf"][0], defs)
    return schema


def kinds(schema: dict[str, Any], defs: dict[str, Any]) -> set[str]:
    """The JSON types that a schema allows."""
    schema = resolved(schema, defs)
    found: set[str] = set()
    for choice in schema.get("anyOf", schema.get("oneOf", ())):
        found |= kinds(choice, defs)
    if isinstance(schema.get("type"), list):
        found |= set(schema["type"])
    elif "type" in schema:
        found.add(schema["type"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        found |= {"null" if value is None else "string" if isinstance(value, str) else "boolean" for value in values}
    return found


def words(schema: dict[str, Any], defs: dict[str, Any]) -> set[str]:
    """The texts that a schema lists."""
    schema = resolved(schema, defs)
    found = {value for value in schema.get("enum", ()) if isinstance(value, str)}
    if isinstance(schema.get("const"), str):
        found.add(schema["const"])
    for choice in schema.get("anyOf", schema.get("oneOf", ())):
        found |= words(choice, defs)
    return found


@pytest.mark.parametrize("name", SHARED)
def test_an_object_that_both_have_is_the_same(name: str) -> None:
    defs = document()["components"]["schemas"]
    ours = defs[name]
    theirs = SHARED[name].model_json_schema(mode="serialization")
    their_defs = theirs.get("$defs", {})
    for field, schema in theirs["properties"].items():
        if (name, field) in LEFT_OUT:
            assert field not in theirs.get("required", ())
            continue
        assert field in ours["properties"], f"{name} has no {field}"
        our_kinds = kinds(ours["properties"][field], defs)
        # Nulls are sent as null, where OpenAI may leave the key out.
        assert our_kinds <= kinds(schema, their_defs) | {"null"}, f"{name}.{field} is {our_kinds}"
        if field in theirs.get("required", ()):
            assert "null" not in our_kinds, f"{name}.{field} may be null"
        listed = words(schema, their_defs)
        if listed:
            assert words(ours["properties"][field], defs) <= listed | WIDER.get((name, field), set()), f"{name}.{field}"
    assert set(theirs.get("required", ())) <= set(ours["properties"])
