"""The breaker: what can only fail is failed at once, with the upstream's own reason, as long as that is fresh."""

from __future__ import annotations

import json

import pytest

from batchery.engine.breaker import FRESH, FRESH_UNREACHABLE, ROW, Breaker, refuses_model
from batchery.store.batches import decode_errors
from batchery.upstreams.base import Answer, Fault
from batchery.upstreams.http import HttpUpstream
from batchery.upstreams.simulator import Behaviour, running_simulator
from tests.engine.rig import Rig
from tests.requests import chat_line

KIND = ("model-a", "/v1/chat/completions")
OTHER = ("model-b", "/v1/chat/completions")
NO_MODEL = Answer(404, b'{"error": {"code": "model_not_found", "message": "The model model-a does not exist."}}')
NO_KEY = Answer(401, b'{"error": {"code": "invalid_api_key", "message": "Incorrect API key provided."}}')
AWAY = Fault("unreachable", "No connection to the upstream: Connection refused.")


def after(breaker: Breaker, outcome: Answer | Fault, count: int, now: float = 0.0) -> Breaker:
    for _ in range(count):
        breaker.failed(KIND, outcome, now)
    return breaker


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (NO_MODEL, "model_not_found"),
        (NO_KEY, "invalid_api_key"),
        (Answer(403, b"{}"), "permission_denied"),
        (Answer(400, b'{"error": {"code": "model_not_found", "message": "m"}}'), "model_not_found"),
    ],
)
def test_the_same_permanent_answer_in_a_row_trips_it(answer: Answer, code: str) -> None:
    breaker = after(Breaker(), answer, ROW - 1)
    assert breaker.watching
    assert breaker.verdict(KIND, 0.0) is None
    reason = after(breaker, answer, 1).verdict(KIND, 0.0)
    assert reason is not None
    assert reason.code == code
    assert "model-a" in reason.message
    assert breaker.verdict(OTHER, 0.0) is None
    assert breaker.verdict((KIND[0], "/v1/embeddings"), 0.0) is None
    assert breaker.tripped == 1


@pytest.mark.parametrize(
    ("outcome", "refuses"),
    [
        (NO_MODEL, True),
        (
            Answer(404, b'{"message": "The model `model-a` does not exist.", "type": "NotFoundError", "code": 404}'),
            True,
        ),
        (Answer(404, b'{"error": {"code": "model_not_found"}}'), True),
        (Answer(400, b'{"error": {"code": "model_not_found"}}'), True),
        (Answer(404, b'{"detail": "Not Found"}'), False),  # there is no such path
        (Answer(400, b'{"error": {"message": "The context of model-a is too short."}}'), False),
        (NO_KEY, False),
        (Answer(500, b"{}"), False),
        (AWAY, False),
    ],
)
def test_which_answers_refuse_the_model(outcome: Answer | Fault, refuses: bool) -> None:
    assert refuses_model(outcome, KIND[0]) == refuses
    breaker = after(Breaker(), outcome, ROW)
    assert breaker.refuses_model(KIND) == refuses
    assert not breaker.refuses_model(OTHER)


def test_the_reason_says_what_the_upstream_said() -> None:
    reason = after(Breaker(), NO_MODEL, ROW).verdict(KIND, 0.0)
    assert reason is not None
    assert "HTTP status 404: The model model-a does not exist." in reason.message


@pytest.mark.parametrize(
    "answer",
    [
        Answer(400, b'{"error": {"code": "context_length_exceeded", "message": "m"}}'),
        Answer(422, b"{}"),
        Answer(429, b"{}"),
        Answer(500, b"{}"),
        Fault("timeout", "m"),
        Fault("broken", "m"),
    ],
)
def test_what_speaks_of_one_request_or_of_the_moment_never_does(answer: Answer | Fault) -> None:
    assert after(Breaker(), answer, 10 * ROW).verdict(KIND, 0.0) is None


def test_a_good_answer_begins_the_row_anew() -> None:
    breaker = after(Breaker(), NO_MODEL, ROW - 1)
    breaker.succeeded(KIND)
    assert not breaker.watching
    assert after(breaker, NO_MODEL, ROW - 1).verdict(KIND, 0.0) is None


def test_another_answer_begins_the_row_anew() -> None:
    breaker = after(Breaker(), NO_MODEL, ROW - 1)
    assert after(breaker, NO_KEY, 1).verdict(KIND, 0.0) is None
    assert after(breaker, NO_KEY, ROW - 1).verdict(KIND, 0.0) is not None


def test_later_it_is_tried_again_and_one_more_is_enough() -> None:
    breaker = after(Breaker(), NO_MODEL, ROW)
    assert breaker.verdict(KIND, FRESH) is not None
    assert breaker.verdict(KIND, FRESH + 1) is None
    assert after(breaker, NO_MODEL, 1, FRESH + 1).verdict(KIND, FRESH + 1) is not None


def test_a_server_is_gone_after_a_long_time_without_a_connection() -> None:
    breaker = Breaker(gone_after=100.0)
    after(breaker, AWAY, 1, 0.0)
    after(breaker, AWAY, 1, 99.0)
    assert breaker.verdict(KIND, 99.0) is None
    reason = after(breaker, AWAY, 1, 120.0).verdict(OTHER, 120.0)
    assert reason is not None
    assert reason.code == "upstream_unreachable"
    assert "2 minutes" in reason.message
    assert "Connection refused" in reason.message
    assert breaker.verdict(KIND, 120.0 + FRESH_UNREACHABLE) is None, "it may be back: ask"
    breaker.succeeded(KIND)
    assert after(breaker, AWAY, 1, 130.0).verdict(KIND, 130.0) is None


async def test_a_wrong_model_fails_the_rest_of_its_batch_and_no_other(rig: Rig) -> None:
    lines = [chat_line(f"request-{i}", f"prompt {i}", model="good" if i % 10 == 0 else "wrong") for i in range(2_000)]
    async with running_simulator(Behaviour(models=("good",))) as simulator:
        upstream = HttpUpstream(simulator.url)
        async with rig.working(upstream, max_in_flight=8, alone=True) as worker:
            id = await rig.create(await rig.upload(lines))
            worker.wake()
            row = await rig.ended(id)
            received = simulator.stats().received
        await upstream.close()
    assert (row.status, row.completed, row.failed) == ("completed", 200, 1_800)
    assert 200 + ROW <= received < 200 + ROW + 20
    assert row.errors is not None
    (error,) = decode_errors(row.errors)
    assert error.code == "model_not_found"
    assert "'wrong'" in error.message
    assert error.line is None
    failed = await rig.lines(row.error_file)
    assert len(failed) == 1_800
    assert {json.dumps(line["error"]["code"]) for line in failed} == {'"model_not_found"'}
    unsent = [line for line in failed if line["response"] is None]
    assert len(unsent) == 2_000 - received
    assert {line["error"]["message"] for line in unsent} == {error.message}
