"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import os

from hypothesis import settings

from tests.databases import database_url, postgres_server

__all__ = ["database_url", "postgres_server"]

settings.register_profile("default", deadline=None, max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100")))
settings.load_profile("default")
