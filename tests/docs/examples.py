"""Running the examples of a page: each `bash` block, and what the block after it says that it answers.

Ids, keys and other random texts in the page stand for whatever they turn out to be: the first answer that shows one
binds it, and later commands and answers mean the real one. Times are any whole number. In an expected object
`"...": "..."` stands for further keys. A command that only reads (GET) is repeated until its answer is as the page
says, because what it reads may still be under way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RANDOM = re.compile(
    r"(?:batch_req_|file-|batch_|upload_|part_|req_|evt_|key_)[0-9a-f]{24,40}|sk-[\w-]{43}|whsec_[\w+/=]{20,}|\b[0-9a-f]{64}\b"
)
_TIME = re.compile(r"(?:.*_at(?:_.*)?|created)")
PATIENCE = 30.0
TIMEOUT = 90.0
"""Seconds that a command may take, or what it has left running may hold its output."""


@dataclass
class Example:
    """A command and its answer.

    Attributes:
        line: where in the page the command begins.
        command: for bash.
        kind: of the block with the answer: `json`, `jsonl`, `text`; empty when the page shows none.
        answer: the block.
    """

    line: int
    command: str
    kind: str = ""
    answer: str = ""


def examples_of(page: str) -> list[Example]:
    """The examples of a page, in order."""
    found: list[Example] = []
    for match in _BLOCK.finditer(page):
        kind, text = match[1], match[2]
        if kind == "bash":
            found.append(Example(page.count("\n", 0, match.start()) + 1, text))
        elif kind in ("json", "jsonl", "text") and found and not found[-1].kind:
            found[-1].kind, found[-1].answer = kind, text
    return found


@dataclass
class Runner:
    """Runs examples one after the other in one folder.

    Attributes:
        folder: where the commands run.
        environment: what they are told.
        known: what the random texts of the page stand for.
    """

    folder: Path
    environment: dict[str, str]
    known: dict[str, str] = field(default_factory=dict)

    def run(self, example: Example) -> None:
        """Run one, and compare its answer."""
        command = self._real(example.command)
        reads = "curl" in command and not re.search(r"-X *(?!GET)|--request|-d |--data|-F |--form", command)
        deadline = time.monotonic() + PATIENCE
        while True:
            done = self._bash(command)
            assert done.returncode == 0, f"line {example.line}: {command}\n{done.stdout}\n{done.stderr}"
            known = dict(self.known)
            try:
                self._compare(example, done.stdout, known)
            except AssertionError:
                if not reads or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
                continue
            self.known = known
            return

    def _bash(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end, and end what it has left running in the background."""
        arguments = ["bash", "-euo", "pipefail", "-c", command]
        with subprocess.Popen(
            arguments,
            cwd=self.folder,
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def _real(self, text: str) -> str:
        return _RANDOM.sub(lambda match: self.known.get(match[0], match[0]), text)

    def _compare(self, example: Example, real: str, known: dict[str, str]) -> None:
        where = f"line {example.line}: {example.command}"
        if example.kind == "json":
            self._same(json.loads(example.answer), json.loads(real), known, where)
        elif example.kind == "jsonl":
            expected, found = ([json.loads(line) for line in text.splitlines()] for text in (example.answer, real))
            self._same(expected, found, known, where)
        elif example.kind == "text":
            wanted = example.answer.strip().splitlines()
            assert len(wanted) == len(real.strip().splitlines()), f"{where}\nanswered:\n{real}"
            for one, other in zip(wanted, real.strip().splitlines(), strict=True):
                self._same(one.strip(), other.strip(), known, where)

    def _same(self, expected: Any, real: Any, known: dict[str, str], where: str, name: str = "") -> None:
        told = f"{where}\n{name}: the page says {expected!r}, the answer is {real!r}"
        if isinstance(expected, dict):
            assert isinstance(real, dict), told
            if "..." in expected:
                assert set(expected) - {"..."} <= set(real), told
            else:
                assert list(expected) == list(real), told
            for key in expected.keys() - {"..."}:
                self._same(expected[key], real[key], known, where, f"{name}.{key}")
        elif isinstance(expected, list):
            assert isinstance(real, list), told
            assert len(expected) == len(real), told
            for place, (one, other) in enumerate(zip(expected, real, strict=True)):
                self._same(one, other, known, where, f"{name}[{place}]")
        elif isinstance(expected, str):
            assert isinstance(real, str), told
            pieces, found = _RANDOM.findall(expected), _RANDOM.findall(real)
            assert len(pieces) == len(found), told
            for piece, other in zip(pieces, found, strict=True):
                assert known.setdefault(piece, other) == other, told
            assert _RANDOM.sub("*", expected) == _RANDOM.sub("*", real), told
        elif type(expected) is int and _TIME.fullmatch(name.rsplit(".", 1)[-1]):
            assert type(real) is int, told
        else:
            assert (type(expected), expected) == (type(real), real), told  # 1 is not true, nor 1.0
