"""Rows as typed values, and turning a database row into one."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


def typed(kind: type[T], row: Any) -> T | None:
    """The row as a struct whose fields are named as the columns; None for no row."""
    return None if row is None else kind(**row._mapping)
