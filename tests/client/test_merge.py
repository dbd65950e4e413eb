"""Result files of several batches made one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.client.errors import InputError, SettingsError
from batchery.client.merge import merge_results
from tests.client.results import answer, failure


def write(folder: Path, *contents: str) -> list[Path]:
    paths = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.jsonl"
        path.write_text(content)
        paths.append(path)
    return paths


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def test_one_line_for_each_custom_id(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        answer("a") + failure("b") + answer("c"),
        answer("b") + answer("a") + failure("d"),
        answer("c", "no") + failure("b"),
    )
    out = tmp_path / "out"
    merged = merge_results(paths, out)
    assert ids(out) == ["a", "c", "b", "d"]
    assert (merged.rows, merged.ok, merged.failed) == (4, 3, 1)
    assert (merged.same, merged.superseded, merged.conflicting, merged.conflicts) == (1, 2, 1, ("c",))


def test_strict_writes_nothing_on_conflict(tmp_path: Path) -> None:
    paths = write(tmp_path, answer("a"), answer("a", "other"))
    with pytest.raises(SettingsError, match="'a'"):
        merge_results(paths, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match="both input and output"):
        merge_results(paths, paths[0])


@pytest.mark.parametrize(
    "line", ["nonsense\n", '{"custom_id": "c", "method": "POST", "body": {}}\n', '{"prompt": "x"}\n']
)
def test_what_is_no_result_is_told_and_nothing_is_written(tmp_path: Path, line: str) -> None:
    paths = write(tmp_path, answer("a"), answer("b") + line)
    with pytest.raises(InputError) as caught:
        merge_results(paths, tmp_path / "out")
    (problem,) = caught.value.problems
    assert (problem.path, problem.line) == (str(paths[1]), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl"]


def test_lines_without_a_custom_id_all_stay(tmp_path: Path) -> None:
    line = json.dumps({"custom_id": None, "response": None, "error": {"code": "invalid_json_line"}}) + "\n"
    assert merge_results(write(tmp_path, line * 3), tmp_path / "out").rows == 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from("xy")), max_size=12))
def test_a_good_answer_is_never_lost(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, bool, str]]
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    content = [answer(name, text) if ok else failure(name, code=text) for name, ok, text in lines]
    merged = merge_results(write(folder, *content), folder / "out")
    assert sorted(ids(folder / "out")) == sorted({name for name, _, _ in lines})
    assert merged.ok == len({name for name, ok, _ in lines if ok})
    assert merged.rows + merged.same + merged.superseded + merged.conflicting == len(lines)
