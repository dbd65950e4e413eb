"""Rows as typed values, and turning database rows into them.

`row._mapping` is what SQLAlchemy has for it, and takes three times as long as its names and values side by side.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

T = TypeVar("T", bound=msgspec.Struct)


def typed(kind: type[T], row: Any) -> T | None:
    """The row as a struct whose fields are named as the columns; None for no row."""
    return None if row is None else kind(**dict(zip(row._fields, row, strict=True)))


def all_typed(kind: type[T], found: sa.CursorResult[Any]) -> list[T]:
    """All rows of a result, likewise."""
    names = tuple(found.keys())
    return [kind(**dict(zip(names, row, strict=True))) for row in found]
