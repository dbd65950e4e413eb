"""Templates: text with `{{column}}` where a row's value goes. Nothing but that: no logic, no code, no reach beyond the
row, so that a template from anywhere is harmless.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from batchery.client.errors import SettingsError

_PLACE = re.compile(r"\\\{\{|\{\{(.*?)\}\}", re.DOTALL)
_MISSING = object()


class MissingColumn(LookupError):
    """A row lacks what a template names.

    Args:
        column: as the template has it.
    """

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


class Template:
    """A template that has been read.

    Args:
        text: a column's name stands between `{{` and `}}`, white space around it counts for nothing; `a.b` reaches into
            an object; `\\{{` stands for `{{` itself.
        option: what it was said with, for errors.

    Raises:
        SettingsError: a `{{` is not closed, or names nothing.
    """

    def __init__(self, text: str, option: str = "--template") -> None:
        self.columns: list[str] = []
        self._texts: list[str] = []
        end = 0
        piece = ""
        for match in _PLACE.finditer(text):
            piece += _plain(text[end : match.start()], option)
            end = match.end()
            if match[1] is None:
                piece += "{{"
                continue
            column = match[1].strip()
            if not column:
                raise SettingsError(f"{option}: {match[0]!r} names no column")
            self._texts.append(piece)
            self.columns.append(column)
            piece = ""
        self._texts.append(piece + _plain(text[end:], option))

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for a row.

        Raises:
            MissingColumn: the row has no such column.
        """
        parts = [self._texts[0]]
        for column, text in zip(self.columns, self._texts[1:], strict=True):
            parts.append(as_text(value_of(row, column)))
            parts.append(text)
        return "".join(parts)


def _plain(text: str, option: str) -> str:
    if "{{" in text:
        raise SettingsError(f"{option}: a '{{{{' is not closed by '}}}}'; write \\{{{{ for the braces themselves")
    return text


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or, where the row has none of that name, what a path such as `a.b` leads to.

    Raises:
        MissingColumn: the row has neither.
    """
    found = row.get(column, _MISSING)
    if found is not _MISSING:
        return found
    value: Any = row
    for name in column.split("."):
        value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            raise MissingColumn(column)
    return value


def as_text(value: Any) -> str:
    """A value as it stands in a text: nothing for null, JSON for what is neither text nor null."""
    if type(value) is str:
        return value
    return "" if value is None else msgspec.json.encode(value).decode()
