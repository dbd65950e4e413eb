"""What a job costs: before it is sent, by which tables, and once tokens were used, as far as prices are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from batchery.client.estimate import Cost, estimate_cost
from batchery.client.objects import Usage
from batchery.client.prepare import Group, Prepared
from batchery.client.price_tables import SHIPPED, PriceTable, find_price, read_table, shipped_tables
from batchery.wire.prices import Price


def tables_of(server: str | None, prices: Path | None) -> list[PriceTable]:
    """The price tables that count, the user's own first.

    Raises:
        SettingsError: the user's cannot be read.
    """
    own = [] if prices is None else [read_table(prices)]
    if server is None or server in SHIPPED:
        return own + shipped_tables(server)
    return own


def costs_of(prepared: Prepared, tables: Sequence[PriceTable], windows: Sequence[str], each: int | None) -> list[Cost]:
    """The cost in each window."""
    return [estimate_cost(prepared.groups, tables, window, output_tokens=each) for window in windows]


def price_of_all(groups: Sequence[Group], tables: Sequence[PriceTable], window: str) -> Price | None:
    """The price of all requests; None where it is unknown, or models differ in it: a server's counts of tokens are of
    all of them together.
    """
    found = [find_price(tables, group.model, window) for group in groups]
    prices = {None if item is None else item[0] for item in found}
    return prices.pop() if len(prices) == 1 else None


def cost_of(usage: Usage | None, price: Price | None) -> float | None:
    """US dollars; None where tokens or price are unknown. No discount for cached tokens is known."""
    if usage is None or price is None:
        return None
    return round((usage.input_tokens * price.input + usage.output_tokens * price.output) / 1e6, 6)


def cost_by_model(
    models: Sequence[tuple[str, Usage]], groups: Sequence[Group], tables: Sequence[PriceTable], window: str
) -> float | None:
    """US dollars for the tokens of several models; None where a price, or all tokens, are unknown.

    Args:
        models: tokens by the model that answered. Servers answer with a dated name, such as `gpt-4o-mini-2024-07-18`
            for `gpt-4o-mini`: it is the requested model whose name it begins with.
        groups: what was requested.
        tables: prices.
        window: the completion window.
    """
    asked = sorted({group.model for group in groups}, key=len, reverse=True)
    total = 0.0
    for answered, usage in models:
        model = next((name for name in asked if answered == name or answered.startswith(f"{name}-")), answered)
        found = find_price(tables, model, window)
        if found is None:
            return None
        total += cost_of(usage, found[0]) or 0.0
    return round(total, 6) if models else None
