"""Make the example input: a batch file that classifies, summarises and questions passages of public-domain literature.

It reads `texts/*.txt` beside it and writes one request for each passage and task. It needs no network and nothing but
Python, and the same texts always give the same bytes.

    python examples/make_example.py                       # writes examples/requests.jsonl
    python examples/make_example.py --model my-model -o my-requests.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent

SYSTEM = "You are a careful reader of literature. Answer only what is asked, without any preamble."

TASKS = {
    "summarise": "Summarise the passage in one sentence.",
    "title": "Give the passage a new title of at most six words.",
    "tone": "Classify the tone of the passage with one word: humorous, solemn, wistful, ominous, admiring or neutral.",
    "genre": "Classify the passage with one word: fable, novel, poem, essay, speech or science.",
    "sentiment": "Classify the sentiment of the passage with one word: positive, negative, mixed or neutral.",
    "names": "List the persons and animals named in the passage as a JSON array of strings.",
    "places": "List the places named in the passage as a JSON array of strings.",
    "keywords": "Give the five keywords that best describe the passage as a JSON array of strings.",
    "simplify": "Rewrite the passage in plain modern English for a ten-year-old.",
    "question": "Ask one question that a reader can answer from the passage alone, and answer it.",
}


class Passage(NamedTuple):
    """A text to ask about.

    Attributes:
        name: the name of its file, which `custom_id`s begin with.
        title, author: as at the top of the file.
        text: the passage itself.
    """

    name: str
    title: str
    author: str
    text: str


def read_passage(path: Path) -> Passage:
    """A passage from its file: `Title:`, `Author:` and `Source:` lines, an empty line, the text.

    Raises:
        ValueError: the file does not look like that.
    """
    head, _, text = path.read_text(encoding="utf-8").partition("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    if set(fields) != {"Title", "Author", "Source"} or not text.strip():
        raise ValueError(f"{path} needs the lines Title, Author and Source, an empty line, and a text")
    return Passage(path.stem, fields["Title"], fields["Author"], text.strip())


def make_requests(passages: list[Passage], model: str) -> Iterator[dict[str, object]]:
    """One request for each passage and task. The passage comes before the task, so that an inference server can keep
    what it computed for the passage from one task to the next.
    """
    for passage in passages:
        for task, instruction in TASKS.items():
            prompt = f"From {passage.title} by {passage.author}:\n\n{passage.text}\n\n{instruction}"
            yield {
                "custom_id": f"{passage.name}-{task}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": model,
                    "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
                    "max_tokens": 256,
                    "temperature": 0,
                },
            }


def main() -> None:
    """Read the texts, write the requests, and say how many."""
    parser = argparse.ArgumentParser(description="Make the example batch file from public-domain texts.")
    parser.add_argument("--model", default="simulated-model", help="the model to ask (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "requests.jsonl", help="default: %(default)s")
    arguments = parser.parse_args()
    passages = [read_passage(path) for path in sorted((HERE / "texts").glob("*.txt"))]
    lines = [json.dumps(request, ensure_ascii=False) for request in make_requests(passages, arguments.model)]
    arguments.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} requests about {len(passages)} passages in {arguments.output}")


if __name__ == "__main__":
    main()
