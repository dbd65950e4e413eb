"""The real app under the real HTTP server, over a real database and folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from batchery.store.database import sqlite_url
from tests.server.rig import Rig, running


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A server over SQLite."""
    async with running(sqlite_url(tmp_path / "batchery.db"), tmp_path) as rig:
        yield rig


@pytest.fixture
async def either(database_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """A server over SQLite, and again over PostgreSQL."""
    async with running(database_url, tmp_path) as rig:
        yield rig
