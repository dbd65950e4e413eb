"""Templates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchery.client.errors import SettingsError
from batchery.client.template import MissingColumn, Template


def test_values_of_all_kinds() -> None:
    row = {"a": "x", "n": 1.5, "no": None, "l": [1, "é"], "o": {"in": "deep"}, "o.p": "flat", "with space": "s"}
    template = Template("{{a}}|{{ n }}|{{no}}|{{l}}|{{o.in}}|{{o.p}}|{{with space}}|{one}|\\{{a}}")
    assert template.render(row) == 'x|1.5||[1,"é"]|deep|flat|s|{one}|{{a}}'
    assert template.columns == ["a", "n", "no", "l", "o.in", "o.p", "with space"]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(MissingColumn) as caught:
        Template("{{o.none}}").render({"o": {"in": 1}})
    assert caught.value.column == "o.none"


@pytest.mark.parametrize("text", ["{{", "a {{b", "{{}}", "{{  }}", "{{a}} {{"])
def test_what_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--template"):
        Template(text)


@given(st.text(), st.text(), st.text())
def test_values_are_never_read_as_templates(before: str, value: str, after: str) -> None:
    before, after = before.replace("{", "").replace("\\", ""), after.replace("{", "")
    assert Template(before + "{{a}}" + after).render({"a": value}) == before + value + after
