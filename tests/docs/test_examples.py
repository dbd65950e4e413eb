"""The running of examples must itself be able to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.examples import Example, Runner, examples_of

ID, OTHER = "file-" + "a" * 32, "file-" + "b" * 32


@pytest.mark.parametrize(
    ("kind", "answer", "real"),
    [
        ("json", '{"a": 1}', '{"a": 2}'),
        ("json", '{"a": 1}', '{"a": 1, "b": 2}'),
        ("json", '{"a": 1, "...": "..."}', '{"b": 2}'),
        ("json", '{"a_at": 1}', '{"a_at": null}'),
        ("json", f'["{ID}", "{ID}"]', f'["{ID}", "{OTHER}"]'),
        ("json", "[1]", "[1, 1]"),
        ("json", "1", "true"),
        ("json", "1", "1.0"),
        ("text", "one\n", "two\n"),
        ("jsonl", '{"a": 1}\n', '{"a": 1}\n{"a": 1}\n'),
    ],
)
def test_another_answer_is_found_out(tmp_path: Path, kind: str, answer: str, real: str) -> None:
    (tmp_path / "real").write_text(real)
    with pytest.raises(AssertionError):
        Runner(tmp_path, {}).run(Example(1, "cat real", kind, answer))


def test_ids_stand_for_what_they_turn_out_to_be(tmp_path: Path) -> None:
    runner = Runner(tmp_path, {})
    runner.run(
        Example(1, f"""echo '{{"id": "{OTHER}", "created_at": 5}}'""", "json", f'{{"id": "{ID}", "created_at": 1}}')
    )
    runner.run(Example(2, f"echo {ID}", "text", ID))
    assert runner.known == {ID: OTHER}


def test_the_blocks_of_a_page() -> None:
    page = "# A\n\n```bash\ncurl x\n```\n\nanswers\n\n```json\n{}\n```\n\n```bash\ntrue\n```\n"
    assert examples_of(page) == [Example(3, "curl x\n", "json", "{}\n"), Example(13, "true\n")]
