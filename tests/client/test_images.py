"""Images of rows: what goes in, and what must not."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from batchery.client.errors import InputProblem
from batchery.client.images import image_urls
from batchery.client.making import Making
from batchery.client.requests import BadRow
from batchery.client.rows import Row, read_rows

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "dot.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    return folder


def test_files_become_data_urls_and_urls_stay(root: Path) -> None:
    assert image_urls("sub/dot.png", root) == [DATA_URL]
    assert image_urls(str(root / "sub" / "dot.png"), root) == [DATA_URL]
    assert image_urls((root / "sub" / "dot.png").as_uri(), root) == [DATA_URL]
    both = ["https://example.org/a.png", DATA_URL]
    assert image_urls(both, root) == both
    assert image_urls("", root) == image_urls(None, root) == []


def test_what_lies_outside_or_is_no_image_stays_here(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "text.png").write_text("no image")
    os.mkfifo(root / "pipe.png")
    for value in (
        "../secret.png",
        str(root.parent / "secret.png"),
        "link.png",
        "text.png",
        "pipe.png",
        "sub",
        "none.png",
        "ftp://example.org/a.png",
        "data:text/html,x",
        "a\0b",
        7,
    ):
        with pytest.raises(BadRow) as caught:
            image_urls(value, root)
        assert caught.value.code == "invalid_image"
    with pytest.raises(BadRow, match="the most is 10"):
        image_urls("sub/dot.png", root, limit=10)
    with pytest.raises(BadRow, match="images, not 200"):
        image_urls(["sub/dot.png"] * 200, root)


@pytest.mark.parametrize(
    ("endpoint", "content"),
    [
        (
            "/v1/chat/completions",
            [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": DATA_URL}}],
        ),
        ("/v1/responses", [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": DATA_URL}]),
    ],
)
def test_an_image_column(root: Path, endpoint: str, content: object) -> None:
    table = root / "in.csv"
    table.write_text("picture\nsub/dot.png\n../secret.png\n")
    making = Making(model="m", template="What?", image_column="picture", endpoint=endpoint)
    row, problem = read_rows([str(table)], making)
    assert isinstance(row, Row)
    assert isinstance(problem, InputProblem)
    body = json.loads(row.line)["body"]
    assert (body.get("messages") or body["input"])[0]["content"] == content
    assert (problem.line, problem.code) == (3, "invalid_image")


def test_images_of_finished_requests_are_encoded(root: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": "sub/dot.png", "detail": "low"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [part]}, {"role": "user", "content": "text"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    path = root / "in.jsonl"
    path.write_text(json.dumps(line))
    (row,) = read_rows([str(path)], Making(encode_images=True))
    assert isinstance(row, Row)
    made = json.loads(row.line)["body"]["messages"][0]["content"][0]["image_url"]
    assert made == {"url": DATA_URL, "detail": "low"}
