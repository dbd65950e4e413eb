"""What whoever asked for a single request is told."""

from __future__ import annotations

import json

from batchery.client.answers import Answer, NoAnswerError, without_result
from batchery.client.errors import ConnectionLostError, SettingsError


def test_a_window_that_is_not_offered_is_no_lost_connection() -> None:
    refused = without_result(None, SettingsError("the server does not offer the window 7h"))
    assert isinstance(refused, Answer)
    assert refused.status == 400
    assert "7h" in json.loads(refused.body)["error"]["message"]
    lost = without_result(None, ConnectionLostError("gone"))
    assert isinstance(lost, NoAnswerError)
    assert lost.code == "connection_lost"
