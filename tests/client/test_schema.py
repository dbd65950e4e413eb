"""Schemas of answers, in the short form and in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.client.errors import SettingsError
from batchery.client.schema import read_schema, short_form, strict


def test_the_short_form() -> None:
    name, schema = read_schema("label: positive|negative, score: number, tags: string[], note: string?, n: (a|b)[]")
    assert name == "answer"
    assert schema == {
        "type": "object",
        "properties": {
            "label": {"type": "string", "enum": ["positive", "negative"]},
            "score": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "note": {"type": ["string", "null"]},
            "n": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
        },
        "required": ["label", "score", "tags", "note", "n"],
        "additionalProperties": False,
    }
    assert short_form("a: x|y?")["properties"]["a"] == {"type": ["string", "null"], "enum": ["x", "y", None]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "label",
        "label:",
        "label: text",
        "1a: string",
        "a: string, a: number",
        "a: x||y",
        "a: x|x",
        "a: []",
        "a b: string",
    ],
)
def test_what_is_no_short_form_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--schema"):
        short_form(text)


def test_json_schema_is_made_strict_at_every_depth(tmp_path: Path) -> None:
    inner = {"type": "object", "properties": {"a": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": {"list": {"type": "array", "items": inner}, "any": {"anyOf": [inner, {"type": "null"}]}},
        "required": ["list"],
        "$defs": {"x": inner},
    }
    path = tmp_path / "My form.json"
    path.write_text(json.dumps(schema))
    name, made = read_schema(f"@{path}")
    whole = inner | {"required": ["a"], "additionalProperties": False}
    assert name == "My_form"
    assert made == {
        "type": "object",
        "properties": {"list": {"type": "array", "items": whole}, "any": {"anyOf": [whole, {"type": "null"}]}},
        "required": ["list", "any"],
        "$defs": {"x": whole},
        "additionalProperties": False,
    }
    assert read_schema(str(path))[1] == made
    assert read_schema(json.dumps({"name": "n", "strict": True, "schema": schema}))[1] == made


@pytest.mark.parametrize(
    "schema",
    [
        [],
        {"type": "array"},
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"type": "object", "properties": {"a": {"type": "object"}}},
    ],
)
def test_what_cannot_be_strict_is_refused(tmp_path: Path, schema: Any) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(schema))
    with pytest.raises(SettingsError):
        read_schema(str(path))


@given(
    st.dictionaries(
        st.from_regex(r"\A[a-z_]{1,8}\Z"), st.sampled_from(["string", "integer[]", "a|b", "number?"]), min_size=1
    )
)
def test_every_short_form_is_strict_already(properties: dict[str, str]) -> None:
    schema = short_form(", ".join(f"{name}: {kind}" for name, kind in properties.items()))
    assert strict(schema) == schema
    assert list(schema["properties"]) == list(properties)
