"""Schema migrations, run by Alembic inside the connection that the caller holds.

Every migration runs on SQLite and PostgreSQL. They are written out, not taken from `schema`, so that an old one still
does what it did.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def config(connection: Connection | None = None) -> Config:
    """The Alembic configuration, without a file."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent))
    settings.attributes["connection"] = connection
    return settings


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest revision, in the caller's transaction."""
    if connection.dialect.name == "postgresql":
        # Several servers may start at once; the first migrates, the others wait and find nothing to do.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7203419065)")
    command.upgrade(config(connection), "head")
