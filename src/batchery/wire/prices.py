"""What tokens cost, as the operator of a server states it: by model, and where they differ by completion window.

[prices."llama-3.1-8b"]
input = 0.05            # US dollars per million tokens
output = 0.08

[prices."llama-3.1-8b"."1h"]
input = 0.10
output = 0.16
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from batchery.wire import strict_json
from batchery.wire.windows import window_seconds

MAX_PRICE = 1e9


class Price(msgspec.Struct, frozen=True):
    """US dollars per million input tokens and per million output tokens."""

    input: float
    output: float


class ModelPrices(msgspec.Struct, frozen=True):
    """What a model costs.

    Attributes:
        general: in windows that have no price of their own; None for unknown.
        windows: by completion window.
    """

    general: Price | None
    windows: dict[str, Price]


Prices = dict[str, ModelPrices]
"""By model."""


def price_of(prices: Prices, model: str, window: str) -> Price | None:
    """What a model costs in a completion window; None for unknown."""
    found = prices.get(model)
    return None if found is None else found.windows.get(window, found.general)


def parse_prices(value: Any) -> Prices:
    """Read a table of prices.

    Args:
        value: decoded TOML or JSON.

    Raises:
        ValueError: names the place, what is wrong with it and what would be accepted.
    """
    if not isinstance(value, dict):
        raise ValueError('prices must be a table of models, such as [prices."my-model"] with input and output')
    return {model: _model(f"prices.{_quoted(model)}", table) for model, table in value.items()}


def _model(place: str, table: Any) -> ModelPrices:
    if not isinstance(table, dict):
        raise ValueError(f"{place} must be a table with input and output")
    windows = {}
    for key, inner in table.items():
        if key in ("input", "output"):
            continue
        try:
            window_seconds(key)
        except ValueError:
            raise ValueError(f"{place}: {key!r} is neither input nor output nor a window such as 24h") from None
        windows[key] = _price(f"{place}.{_quoted(key)}", inner)
    if not windows or "input" in table or "output" in table:
        general = {key: amount for key, amount in table.items() if key not in windows}
        return ModelPrices(_price(place, general), windows)
    return ModelPrices(None, windows)


def _price(place: str, table: Any) -> Price:
    if not isinstance(table, dict):
        raise ValueError(f"{place} must be a table with input and output")
    for key in table:
        if key not in ("input", "output"):
            raise ValueError(f"{place}: {key!r} is neither input nor output")
    return Price(_amount(place, table, "input"), _amount(place, table, "output"))


def _amount(place: str, table: dict[str, Any], key: str) -> float:
    if key not in table:
        raise ValueError(f"{place}.{key} is missing; both input and output are needed, 0 for what costs nothing")
    amount = table[key]
    if type(amount) not in (int, float) or not 0 <= amount <= MAX_PRICE:  # nor infinite, nor no number
        raise ValueError(
            f"{place}.{key} must be a number of US dollars per million tokens, from 0 to {MAX_PRICE:.0f}, not "
            f"{strict_json.describe(amount)}"
        )
    return float(amount)


def _quoted(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)  # as TOML would have it, too
