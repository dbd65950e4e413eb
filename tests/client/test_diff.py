"""Two files compared by custom_id."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchery.client.diff import diff_files
from batchery.client.errors import InputError, SettingsError
from tests.client.fake_server import requests
from tests.client.results import answer, failure


def differences(folder: Path, old: str | bytes, new: str | bytes) -> list[tuple[str, str, str]]:
    paths = folder / "old.jsonl", folder / "new.jsonl"
    for path, content in zip(paths, (old, new), strict=True):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(found.custom_id, found.change, found.what) for found in diff_files(*paths)]


def test_requests(tmp_path: Path) -> None:
    line = '{{"custom_id": "{}", "method": "POST", "url": "/v1/embeddings", "body": {{"model": "m", {}}}}}\n'
    old = line.format("same", '"input": "x"') + line.format("a", '"input": "x", "n": 1') + line.format("gone", '"i": 1')
    new = (
        "\ufeff"
        + line.format("new", '"i": 1')
        + line.format("a", '"input": ["x"]')
        + line.format("same", '"input":"x"')
    )
    assert differences(tmp_path, old, new) == [
        ("new", "added", ""),
        ("a", "changed", 'body.input: "x" -> ["x"]; body.n: 1 -> nothing'),
        ("gone", "removed", ""),
    ]


def test_of_results_the_answer_counts_and_not_its_ids(tmp_path: Path) -> None:
    old = answer("a") + answer("b") + failure("c")
    new = answer("a").replace("chatcmpl-a", "other").replace('"prompt_tokens": 3', '"prompt_tokens": 9')
    new += answer("b", "no") + answer("c")
    found = differences(tmp_path, old, new)
    assert [(custom_id, change) for custom_id, change, _ in found] == [("b", "changed"), ("c", "changed")]
    assert found[0][2] == 'body.choices[0].message.content: "yes" -> "no"'
    assert found[1][2].startswith('status_code: 500 -> 200; error: "server_error" -> null')


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="two of a kind"):
        differences(tmp_path, requests(1), answer("a"))
    for wrong in ("nonsense\n", '{"body": 1}\n', answer("a") + answer("a")):
        with pytest.raises(InputError):
            differences(tmp_path, answer("a") if wrong.startswith('{"id') else requests(1), wrong)
