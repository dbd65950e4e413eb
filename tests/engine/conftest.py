"""A rig on each kind of database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.engine.rig import Rig


@pytest.fixture
async def rig(database_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(database_url, tmp_path / "blobs")
    await rig.database.migrate()
    yield rig
    await rig.database.close()
