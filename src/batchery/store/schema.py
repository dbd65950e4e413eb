"""The tables. One schema for SQLite and PostgreSQL; `migrations/` builds it, and a test holds the two together.

Ids are bare 32 hex digits (`batchery.wire.ids` puts the prefixes on). Times are Unix seconds: whole numbers where the
API shows them, fractions where leases are compared. `seq` gives files and batches a strict order of creation, also
within one second.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Serial = BigInteger().with_variant(Integer, "sqlite")
_Id = String(32)

files = Table(
    "files",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", _Id, nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("filename", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("status_details", Text),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    # Where the bytes are; null while the file still grows in `results`.
    Column("blob_key", String(128)),
    Column("sha256", String(64)),
    # Lines of the finished file; for an upload, its physical lines.
    Column("lines", BigInteger, nullable=False),
    # Of an upload: its requests, what they name, where they are, and what is wrong with it.
    Column("requests", BigInteger, nullable=False),
    Column("models", LargeBinary),
    Column("index_key", String(128)),
    Column("problems", LargeBinary),
    # Of an output or error file: the batch that it belongs to.
    Column("batch_id", _Id),
    Index("ix_files_owner_seq", "owner", "seq"),
    sqlite_autoincrement=True,
)

batches = Table(
    "batches",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", _Id, nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("model", Text),
    Column("errors", LargeBinary),
    Column("input_file", _Id, nullable=False),
    Column("window", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    # How a batch that is finalizing will end: completed or expired.
    Column("ending", String(16)),
    Column("output_file", _Id, nullable=False),
    Column("error_file", _Id),
    Column("output_expires_after", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("in_progress_at", BigInteger),
    Column("expires_at", BigInteger, nullable=False),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Column("total", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    # The length of each growing file so far: lines, which is also the next position, and bytes.
    Column("output_lines", BigInteger, nullable=False),
    Column("output_bytes", BigInteger, nullable=False),
    Column("error_lines", BigInteger, nullable=False),
    Column("error_bytes", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("metadata", LargeBinary, nullable=False),
    # Who plans or finalises it just now.
    Column("lease_owner", _Id),
    Column("lease_until", Float),
    # Whether rows of `results` or `shards` are left to drop after the end.
    Column("has_log", Boolean, nullable=False, server_default=false()),
    Index("ix_batches_owner_seq", "owner", "seq"),
    Index("ix_batches_input_file", "input_file"),
    Index(
        "ix_batches_live",
        "expires_at",
        sqlite_where=text("status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"),
        postgresql_where=text("status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"),
    ),
    Index(
        "ix_batches_has_log",
        "seq",
        sqlite_where=text("has_log"),
        postgresql_where=text("has_log"),
    ),
    sqlite_autoincrement=True,
)

shards = Table(
    "shards",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("batch_id", _Id, ForeignKey("batches.id"), nullable=False),
    Column("model", Text, nullable=False),
    # The batch's expires_at, here so that the next work is found by one index.
    Column("deadline", BigInteger, nullable=False),
    # The requests, unsigned 32 bit each, in the order in which they go out.
    Column("requests", LargeBinary, nullable=False),
    # One bit for each of them that is recorded; null before the first.
    Column("done", LargeBinary),
    Column("lease_owner", _Id),
    Column("lease_until", Float),
    # Grows with every lease: what a former holder still wants to record is refused by it.
    Column("epoch", Integer, nullable=False),
    Index("ix_shards_deadline", "deadline", "id"),
    Index("ix_shards_batch_id", "batch_id"),
    Index("ix_shards_lease_owner", "lease_owner"),
    sqlite_autoincrement=True,
)

results = Table(
    "results",
    metadata,
    Column("batch_id", _Id, ForeignKey("batches.id"), primary_key=True),
    # 0 output, 1 error
    Column("kind", SmallInteger, primary_key=True, autoincrement=False),
    # Of the first line here in its file, from 0; gapless.
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("count", Integer, nullable=False),
    # For each line, unsigned 32 bit: which request it answers, where it ends in `body`, and after how many attempts.
    Column("requests", LargeBinary, nullable=False),
    Column("ends", LargeBinary, nullable=False),
    Column("attempts", LargeBinary, nullable=False),
    # The lines themselves.
    Column("body", LargeBinary, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", String(32), nullable=False),
    Column("started_at", Float, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
)
