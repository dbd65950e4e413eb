"""The links between the pages: each leads to a file that is there, and to a heading that it has."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
)
_CODE = re.compile(r"^(```|~~~).*?^\1$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def links_of(text: str) -> list[str]:
    """Where the links of a page lead, but for those in code."""
    return _LINK.findall(_CODE.sub(lambda match: "" if match[1] else "code", text))


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", _FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again, number = slug, 0
        while again in found:
            number += 1
            again = f"{slug}-{number}"
        found.add(again)
    return found


@cache
def _anchors(path: Path) -> set[str]:
    return anchors_of(path.read_text())


def wrong_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for link in links_of(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in _anchors(target))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert not wrong_links(page)


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# One `two`\n\n## Which server, which key\n\n## One two\n\n```\n## Not one\n```\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n\n[a](other.md) [b](other.md#which-server-which-key) [c](#here) [`d`](other.md#one-two-1)\n"
        "[e](https://example.com/#x) `[f](code.md)`\n\n```\n[g](code.md)\n```\n\n"
        "[h](gone.md) [i](other.md#not-one) [j](#nowhere) [k\nl](../gone.md)\n"
    )
    assert wrong_links(page) == ["gone.md", "other.md#not-one", "#nowhere", "../gone.md"]
