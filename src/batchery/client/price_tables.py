"""Price tables: what servers ask for tokens, shipped as data that says its date and source, or a user's own file.

A model that no table has is unknown, and so is what it costs; nothing is ever guessed from a similar name.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from batchery.client.errors import SettingsError
from batchery.wire.prices import Price, Prices, parse_prices, price_of

SHIPPED = ("doubleword", "openai")
MAX_TABLE_BYTES = 4 * 1024 * 1024


class PriceTable(msgspec.Struct, frozen=True):
    """What a server asks.

    Attributes:
        name: of the server, or the path of a user's file.
        date: when the prices were read, `YYYY-MM-DD`; empty where a user's file does not say.
        source: where they are from.
        note: what to know about them.
        prices: by model and window, in US dollars per million tokens.
    """

    name: str
    date: str
    source: str
    note: str
    prices: Prices

    @property
    def described(self) -> str:
        """The table in words, for people."""
        dated = f" of {self.date}" if self.date else ""
        source = f" ({self.source})" if self.source and self.source != self.name else ""
        return f"{self.name}{dated}{source}"


def shipped_tables(server: str | None = None) -> list[PriceTable]:
    """The tables that come with the package.

    Args:
        server: only of this one, by its name in `limits.SERVERS`; None for all.
    """
    folder = resources.files("batchery.client") / "prices"
    names = [name for name in SHIPPED if server in (None, name)]
    return [parse_table((folder / f"{name}.toml").read_text("utf-8"), name) for name in names]


def read_table(path: Path) -> PriceTable:
    """A user's own table, TOML in the form of the shipped ones.

    Raises:
        SettingsError: it cannot be read, or is not a table of prices.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TABLE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"--prices {path}: {error.strerror}") from None
    if len(content) > MAX_TABLE_BYTES:
        raise SettingsError(f"--prices {path} is larger than {MAX_TABLE_BYTES} bytes")
    try:
        return parse_table(content.decode(), str(path))
    except ValueError as error:
        raise SettingsError(f"--prices {path}: {error}") from None


def parse_table(text: str, name: str) -> PriceTable:
    """A table from TOML: `[prices."MODEL"]` with `input` and `output`, or `[prices."MODEL"."24h"]` for one window.

    Raises:
        ValueError: names the place and what is wrong with it.
    """
    value: dict[str, Any] = tomllib.loads(text)
    date = value.get("date", "")
    texts = {key: value.get(key, "") for key in ("name", "source", "note")}
    for key, found in texts.items():
        if type(found) is not str:
            raise ValueError(f"{key} must be a text")
    if "prices" not in value:
        raise ValueError('it has no prices; write [prices."my-model"] with input and output')
    return PriceTable(
        texts["name"] or name,
        date.isoformat() if isinstance(date, datetime.date) else str(date),
        texts["source"],
        texts["note"],
        parse_prices(value["prices"]),
    )


def find_price(tables: Sequence[PriceTable], model: str, window: str) -> tuple[Price, PriceTable] | None:
    """What a model costs, by the first table that has a price for it in this window; None for unknown."""
    for table in tables:
        price = price_of(table.prices, model, window)
        if price is not None:
            return price, table
    return None
