"""Tokens, prices and cost before anything is sent."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from batchery.client.errors import SettingsError
from batchery.client.estimate import estimate_cost, over_max_cost
from batchery.client.prepare import Group
from batchery.client.price_tables import find_price, parse_table, read_table, shipped_tables
from batchery.client.tokens import IMAGE_TOKENS, count_tokens
from batchery.wire.prices import Price

TABLE = parse_table(
    """
    date = 2026-01-02
    source = "https://example.org"
    [prices."a"."24h"]
    input = 1.0
    output = 2.0
    [prices."a"."1h"]
    input = 10
    output = 20
    [prices.free]
    input = 0
    output = 0
    """,
    "mine",
)
CHAT = "/v1/chat/completions"


def line(body: dict[str, object], url: str = CHAT) -> bytes:
    return json.dumps({"custom_id": "x", "method": "POST", "url": url, "body": body}).encode()


def test_tokens_are_counted_by_bytes_and_images_by_number() -> None:
    text = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 50}
    body, tokens = count_tokens(line(text), CHAT)
    assert json.loads(body) == text
    assert (tokens.input, tokens.images, tokens.limit) == (len(body) // 4, 0, 50)
    picture = "data:image/png;base64," + "A" * 1_000_000
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": picture}}]
    tokens = count_tokens(line({"model": "m", "messages": [{"role": "user", "content": parts}]}), CHAT)[1]
    assert tokens.images == 1
    assert IMAGE_TOKENS <= tokens.input < IMAGE_TOKENS + 100


def test_cost_by_window_and_within_what_requests_allow() -> None:
    group = Group("a", CHAT, requests=10, size=1, input_tokens=1_000_000, limited=10, limit=1_000)
    day = estimate_cost([group], [TABLE], "24h")
    assert (day.output_tokens, day.cost, day.most_cost) == (1_000, 1.002, 1.002)
    hour = estimate_cost([group], [TABLE], "1h", output_tokens=50)
    assert (hour.output_tokens, hour.cost, hour.most_cost) == (500, 10.01, 10.02)
    free = Group("a", CHAT, requests=10, size=1, input_tokens=0, limited=9, limit=90)
    assert estimate_cost([free], [TABLE], "24h").most_cost is None
    vectors = Group("free", "/v1/embeddings", requests=10, size=1, input_tokens=9)
    assert estimate_cost([vectors], [TABLE], "24h").output_tokens == 0
    assert day.prices == ("mine of 2026-01-02 (https://example.org)",)


def test_an_unknown_price_is_unknown_and_within_no_limit() -> None:
    groups = [Group(model, CHAT, requests=1, size=1, input_tokens=1_000_000) for model in ("a", "b")]
    cost = estimate_cost(groups, [TABLE], "24h")
    assert (cost.cost, cost.unknown) == (None, ("b",))
    assert cost.known_cost == pytest.approx(1.000512)
    assert "no price is known for b" in (over_max_cost(cost, 1e9) or "")
    assert estimate_cost(groups[:1], [TABLE], "2h").cost is None


def test_max_cost() -> None:
    cost = estimate_cost([Group("a", CHAT, requests=1, size=1, input_tokens=1_000_000)], [TABLE], "24h")
    assert over_max_cost(cost, 1.1) is None
    assert "over --max-cost $1.0000" in (over_max_cost(cost, 1.0) or "")


def test_the_shipped_tables_say_where_they_are_from() -> None:
    tables = shipped_tables()
    assert [table.name for table in tables] == ["Doubleword", "OpenAI"]
    for table in tables:
        assert datetime.date.fromisoformat(table.date)
        assert table.source.startswith("https://")
        assert table.note
        assert table.prices
        assert all(prices.general is None and prices.windows for prices in table.prices.values())
    model = "Qwen/Qwen3-VL-30B-A3B-Instruct-FP8"
    found = [find_price(tables, model, window) for window in ("24h", "1h", "2h")]
    assert [price and price[0] for price in found] == [Price(0.05, 0.2), Price(0.07, 0.3), None]
    assert [table.name for table in shipped_tables("openai")] == ["OpenAI"]


def test_a_table_of_ones_own_comes_first_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('[prices."gpt-4o"]\ninput = 0\noutput = 0\n')
    found = find_price([read_table(path), *shipped_tables()], "gpt-4o", "24h")
    assert found is not None
    assert found[0] == Price(0, 0)
    for wrong in ("x", "name = 'n'", "[prices.m]\ninput = 1\n", "name = 7\n[prices.m]\ninput = 1\noutput=1", "\xff"):
        path.write_text(wrong, encoding="latin1")
        with pytest.raises(SettingsError, match="--prices"):
            read_table(path)
    with pytest.raises(SettingsError, match="No such file"):
        read_table(tmp_path / "none")
