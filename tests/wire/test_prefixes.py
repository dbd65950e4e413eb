"""Which prompts begin alike: found whatever the order of the lines, in bounded memory, and named alike in all files."""

from __future__ import annotations

import itertools
import json
import random
import time
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.wire.lines import Limits, parse_line
from batchery.wire.prefixes import BLOCK, Prefixes, PrefixTree
from batchery.wire.validation import validate
from tests.requests import chat_line

CHAT = "/v1/chat/completions"
RANDOM = random.Random(7)
WORDS = ["".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=RANDOM.randint(2, 9))) for _ in range(3_000)]


def text(words: int) -> str:
    return " ".join(RANDOM.choices(WORDS, k=words))


def chat(system: str, user: str) -> bytes:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"model": "m", "messages": messages}
    return json.dumps({"custom_id": text(2), "method": "POST", "url": CHAT, "body": body}).encode()


def learn(lines: list[bytes], url: str = CHAT, **bounds: int) -> Prefixes:
    tree = PrefixTree(**bounds)
    for line in lines:
        tree.add(line, url)
    return tree.finish()


def changes(found: Prefixes, kinds: list[int]) -> int:
    """How often the next request in order begins otherwise than the last one."""
    order = found.in_order(array("I", range(len(kinds))))
    assert sorted(order) == list(range(len(kinds)))
    return sum(kinds[a] != kinds[b] for a, b in itertools.pairwise(order))


def shuffled(systems: list[str], each: int, words: int = 15) -> tuple[list[bytes], list[int]]:
    kinds = [kind for kind in range(len(systems)) for _ in range(each)]
    RANDOM.shuffle(kinds)
    return [chat(systems[kind], text(words)) for kind in kinds], kinds


@pytest.mark.parametrize(
    ("common", "own", "words"),
    [(0, 20, 5), (0, 300, 30), (700, 100, 30), (700, 20, 10), (0, 2_000, 10), (50, 50, 800)],
    ids=["short", "usual", "late difference", "late and short", "long", "long questions"],
)
def test_requests_with_one_of_50_beginnings_stand_together(common: int, own: int, words: int) -> None:
    beginning = text(common)
    lines, kinds = shuffled([f"{beginning} {text(own)}" for _ in range(50)], 20, words)
    assert changes(learn(lines), kinds) <= 49 + 2


def test_beginnings_within_beginnings_stand_together_at_both_levels() -> None:
    outer = [text(100) for _ in range(5)]
    inner = [f"{outer[i % 5]} {text(60)}" for i in range(40)]
    lines, kinds = shuffled(inner, 20)
    found = learn(lines)
    assert changes(found, kinds) <= 39 + 2
    assert changes(found, [kind % 5 for kind in kinds]) <= 4 + 1


def test_what_shares_nothing_keeps_the_order_of_the_file() -> None:
    found = learn([chat(text(30), text(10)) for _ in range(500)])
    assert found == Prefixes(None, array("Q", [0]))


def test_one_beginning_for_all_keeps_the_order_of_the_file_and_has_a_key() -> None:
    system = text(100)
    found = learn([chat(system, text(20)) for _ in range(500)])
    assert found.groups is None
    assert found.keys[0] != 0


def test_the_same_beginnings_have_the_same_keys_in_all_files() -> None:
    systems = [text(100) for _ in range(10)]

    def keys_of(some: list[str]) -> dict[int, int]:
        lines, kinds = shuffled(some, 30)
        found = learn(lines)
        last = {}
        for request, kind in enumerate(kinds):
            last[systems.index(some[kind])] = found.key(request)
        return last

    everything, half, alone = keys_of(systems), keys_of(systems[3:8]), keys_of(systems[4:5])
    assert len(set(everything.values())) == 10
    assert {kind: everything[kind] for kind in half} == half
    assert alone == {4: everything[4]}


def test_more_beginnings_than_there_is_room_for_are_passed_over() -> None:
    lines, kinds = shuffled([text(100) for _ in range(300)], 4)
    tight = learn(lines, max_text=50_000, max_nodes=100)
    assert len(tight.keys) <= 100
    changes(tight, kinds)


def test_beginnings_whose_text_was_let_go_are_still_known() -> None:
    lines, kinds = shuffled([text(150) for _ in range(40)], 100)
    assert changes(learn(lines, max_text=60_000), kinds) <= 2 * 39


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "{}"}),
        ("/v1/responses", {"input": "?", "instructions": "{}"}),
        ("/v1/responses", {"instructions": "{}", "input": "?"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "?"}], "system": "{}"}),
    ],
)
def test_every_url_has_its_own_place_for_the_prompt(url: str, body: dict[str, Any]) -> None:
    systems = [text(60) for _ in range(8)]
    kinds = [RANDOM.randrange(8) for _ in range(200)]
    lines = []
    for kind in kinds:
        filled = json.dumps({"model": "m", "user": text(3), **body}).replace("{}", systems[kind])
        lines.append(f'{{"custom_id":"{text(2)}","method":"POST","url":"{url}","body":{filled}}}'.encode())
    # Where the shared text comes last in the line, what comes before it must not tell the requests apart.
    assert changes(learn(lines, url), kinds) <= 7 + 2


def test_embeddings_have_no_prefix_cache_to_be_ordered_for() -> None:
    lines = [f'{{"input":"{"x" * 300}{i % 2}{"y" * 300}"}}'.encode() for i in range(100)]
    assert learn(lines, "/v1/embeddings") == Prefixes(None, array("Q", [0]))


@given(st.lists(st.binary(max_size=4 * BLOCK), max_size=40), st.integers(0, 2_000), st.integers(1, 20))
def test_any_bytes_leave_an_order_of_all_requests(rests: list[bytes], max_text: int, max_nodes: int) -> None:
    found = learn([b'"messages"' + rest for rest in rests], max_text=max_text, max_nodes=max_nodes)
    order = found.in_order(array("I", range(len(rests))))
    assert sorted(order) == list(range(len(rests)))
    assert all(found.key(request) in found.keys for request in order)
    keys = [found.keys[0 if found.groups is None else found.groups[request]] for request in order]
    assert len([0 for a, b in itertools.pairwise(keys) if a != b]) < len(found.keys)


def test_the_index_has_a_model_s_requests_in_this_order_and_not_the_bad_lines() -> None:
    systems = [text(60) for _ in range(3)]
    lines = []
    for i in range(90):
        line = json.loads(chat(systems[i % 3], text(10)))
        line["custom_id"] = str(i if i != 50 else 1)  # used before
        line["body"]["model"] = "ab"[i % 2]
        lines.append(json.dumps(line).encode() + b"\n")
    data = b"".join(lines)
    report = validate([data], Limits(), lambda start, length: data[start : start + length])
    index = report.index
    assert len(index.bad) == 1
    assert index.prefixes.groups is not None
    assert len(index.prefixes.groups) == len(index) == 89
    for model, requests in zip(index.models, index.by_model, strict=True):
        found = [json.loads(data[index.starts[i] :].split(b"\n", 1)[0]) for i in requests]
        assert {line["body"]["model"] for line in found} == {model}
        kinds = [line["body"]["messages"][0]["content"] for line in found]
        assert sum(a != b for a, b in itertools.pairwise(kinds)) == 2


def test_a_line_costs_no_more_than_its_validation() -> None:
    lines, _ = shuffled([text(150) for _ in range(50)], 40)

    def least(act: Any) -> float:
        times = []
        for _ in range(5):
            began = time.process_time()
            act()
            times.append(time.process_time() - began)
        return min(times)

    limits = Limits()
    parsing = least(lambda: [parse_line(line, 1, limits) for line in lines])
    assert least(lambda: learn(lines)) < 2 * parsing


def test_chat_lines_of_the_other_tests_have_no_order_of_their_own() -> None:
    lines = [chat_line(str(i), f"{i}") for i in range(100)]
    assert learn(lines).groups is None
