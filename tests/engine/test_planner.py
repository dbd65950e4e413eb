"""The planner's cut: every request once, models apart, shards of a sensible size."""

from __future__ import annotations

import time
from array import array
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.engine.planner import MAX_SHARDS, SHARD_REQUESTS, cut, shard_size
from batchery.wire.file_index import FileIndex


def index_of(models: list[str]) -> FileIndex:
    """An index of a file whose requests ask for these models."""
    by_model: dict[str, array[int]] = defaultdict(lambda: array("I"))
    for request, model in enumerate(models):
        by_model[model].append(request)
    return FileIndex(
        starts=array("Q", range(len(models))),
        lengths=array("I", [1]) * len(models),
        numbers=None,
        models=tuple(by_model),
        by_model=tuple(by_model.values()),
        urls=("/v1/chat/completions",),
    )


def unpacked(requests: bytes) -> list[int]:
    return list(array("I", requests))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 700)), max_size=12))
def test_every_request_is_in_one_shard_of_its_model(runs: list[tuple[str, int]]) -> None:
    models = [model for model, count in runs for _ in range(count)]
    plan = [(model, unpacked(requests)) for model, requests in cut(index_of(models))]
    seen = [request for _, requests in plan for request in requests]
    assert sorted(seen) == list(range(len(models)))
    for model, requests in plan:
        assert 1 <= len(requests) <= shard_size(len(models))
        assert requests == sorted(requests)
        assert {models[request] for request in requests} == {model}
    for model in set(models):
        mine = [requests for of, requests in plan if of == model]
        assert [request for requests in mine for request in requests] == [
            request for request, of in enumerate(models) if of == model
        ]


def test_models_alternate_even_in_a_file_sorted_by_model() -> None:
    plan = cut(index_of(["a"] * 600 + ["b"] * 300 + ["c"]))
    assert [model for model, _ in plan] == ["a", "b", "c", "a", "b", "a"]


def test_an_empty_file_has_an_empty_plan() -> None:
    assert cut(index_of([])) == []


@pytest.mark.parametrize(
    ("requests", "size"),
    [
        (1, SHARD_REQUESTS),
        (50_000, SHARD_REQUESTS),
        (SHARD_REQUESTS * MAX_SHARDS, SHARD_REQUESTS),
        (SHARD_REQUESTS * MAX_SHARDS + 1, SHARD_REQUESTS + 1),
        (10_000_000, 4883),
    ],
)
def test_shard_size(requests: int, size: int) -> None:
    assert shard_size(requests) == size
    assert -(-requests // size) <= MAX_SHARDS


def test_a_million_requests_are_planned_at_once() -> None:
    models = ["a", "b"] * 500_000
    index = index_of(models)
    started = time.perf_counter()
    plan = cut(index)
    assert time.perf_counter() - started < 1.0
    assert len(plan) <= MAX_SHARDS + 2
    assert sum(len(requests) for _, requests in plan) == 4_000_000
