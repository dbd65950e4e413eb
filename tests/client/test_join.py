"""Rows and what became of them, as columns."""

from __future__ import annotations

from batchery.client.join import InputRow, flat


def test_no_own_column_is_lost_to_another_name() -> None:
    own = {"status": "1", "input_status": "2", "input_input_status": "3", "input_tokens": "4", "input_note": "5"}
    values = flat(InputRow("a", 1, own), None, None)
    assert [values[name] for name in values if values[name] in own.values()] == list(own.values())
    assert (values["status"], values["input_status"], values["input_note"]) == ("not_run", "1", "5")
    once_more = flat(InputRow("a", 1, values), None, None)
    assert len(once_more) == len(values) + (len(values) - len(own)) - 1  # both have one custom_id
