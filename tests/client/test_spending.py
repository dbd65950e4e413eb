"""What used tokens cost: one price for all, or each model its own."""

from __future__ import annotations

import pytest

from batchery.client.objects import Usage
from batchery.client.prepare import Group
from batchery.client.price_tables import parse_table
from batchery.client.spending import cost_by_model, cost_of, price_of_all
from batchery.wire.prices import Price

TABLES = [parse_table('[prices."a"]\ninput = 1\noutput = 2\n[prices."a-b"]\ninput = 10\noutput = 20\n', "own")]
MILLION = Usage(1_000_000, 1_000_000)


def groups(*models: str) -> list[Group]:
    return [Group(model, "/v1/chat/completions") for model in models]


@pytest.mark.parametrize(
    ("models", "price"), [(["a"], Price(1, 2)), (["a", "a"], Price(1, 2)), (["a", "a-b"], None), (["a", "x"], None)]
)
def test_one_price_for_all(models: list[str], price: Price | None) -> None:
    assert price_of_all(groups(*models), TABLES, "24h") == price
    assert cost_of(MILLION, price) == (None if price is None else 3.0)


@pytest.mark.parametrize(
    ("answered", "cost"),
    [
        ([("a", MILLION), ("a-b", MILLION)], 33.0),
        ([("a-2024-07-18", MILLION)], 3.0),
        ([("a-b-2024", MILLION)], 30.0),  # of two names that it begins with, the longer
        ([("ab", MILLION)], None),
        ([("a", MILLION), ("x", MILLION)], None),
        ([], None),
    ],
)
def test_each_model_its_own(answered: list[tuple[str, Usage]], cost: float | None) -> None:
    assert cost_by_model(answered, groups("a", "a-b"), TABLES, "24h") == cost
