"""A real server in front of a simulated model, and a folder to work in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchery import Client
from tests.processes import server, simulator


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder, and an environment that names no server."""
    for name in list(os.environ):
        if name.startswith(("BATCHERY_", "OPENAI_", "DOUBLEWORD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".none"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a real batchery server over the simulator, for the tests of a file."""
    place = tmp_path_factory.mktemp("server")
    with simulator(place, "--latency", "5ms") as upstream, server(place, upstream.url) as process:
        yield process.url


@pytest.fixture
def client(served: str) -> Iterator[Client]:
    """A client of that server."""
    with Client(served) as found:
        yield found
