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
    literal_column,
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

LIVE = ("validating", "in_progress", "finalizing", "cancelling")
"""The statuses of a batch that has not ended."""

LIVE_SQL = tuple(literal_column(f"'{status}'", String) for status in LIVE)
"""The same, written into a query's text: only then is SQLite sure that the index of live batches will do, and nobody
has to put them there each time."""

ENDED = ("completed", "failed", "expired", "cancelled")
"""The statuses of one that has."""

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
    # Of an upload: how many requests and bytes there are of each model and url.
    Column("groups", LargeBinary),
    # Of an output or error file: the batch that it belongs to.
    Column("batch_id", _Id),
    # Of an upload: the key that it came with; null while there were no keys.
    Column("api_key", _Id),
    Index("ix_files_owner_seq", "owner", "seq"),
    Index("ix_files_expires_at", "expires_at"),
    Index("ix_files_batch_id", "batch_id"),
    Index("ix_files_api_key", "api_key"),
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
    # The key that it was created with; null while there were no keys.
    Column("api_key", _Id),
    # Deleted by its owner: nobody sees it any more; its row goes once it has ended and its log is dropped.
    Column("deleted_at", BigInteger),
    # Whether bad lines of the input file are passed over, and how many of its requests are such lines. Each is one of
    # `total` and `failed`, and has a line in the error file from the start.
    Column("skip_invalid", Boolean, nullable=False, server_default=false()),
    Column("invalid", BigInteger, nullable=False, server_default=text("0")),
    # The blob that says where each request's result is in the finished files, or `small_indexes` if it is there.
    Column("result_index", String(128)),
    # Where its end is told, and what that is signed with.
    Column("webhook_url", Text),
    Column("webhook_secret", Text),
    # When its first request could go out, exactly, and how many results it had then: a retried batch has some.
    Column("run_started_at", Float),
    Column("run_done", BigInteger, nullable=False, server_default=text("0")),
    # Whether identical deterministic requests are sent once, how many were answered by another's answer, and the tokens
    # that these would have taken.
    Column("deduplicate", Boolean, nullable=False, server_default=false()),
    Column("deduplicated", BigInteger, nullable=False, server_default=text("0")),
    Column("deduplicated_input_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("deduplicated_output_tokens", BigInteger, nullable=False, server_default=text("0")),
    Index("ix_batches_owner_seq", "owner", "seq"),
    # For lists that are filtered: answers every filter by itself.
    Index(
        "ix_batches_listed",
        "owner",
        "status",
        "seq",
        "created_at",
        "window",
        sqlite_where=text("deleted_at IS NULL"),
        postgresql_where=text("deleted_at IS NULL"),
    ),
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
    Index(
        "ix_batches_deleted",
        "seq",
        sqlite_where=text("deleted_at IS NOT NULL"),
        postgresql_where=text("deleted_at IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)

shards = Table(
    "shards",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("batch_id", _Id, ForeignKey("batches.id"), nullable=False),
    Column("model", Text, nullable=False),
    # The batch's expires_at.
    Column("deadline", BigInteger, nullable=False),
    # The requests, unsigned 32 bit each, in the order in which they go out.
    Column("requests", LargeBinary, nullable=False),
    # One bit for each of them that is recorded; null before the first.
    Column("done", LargeBinary),
    # Where some of them are answered by one answer: for each the place of the first like it, unsigned 32 bit.
    Column("twins", LargeBinary),
    Column("lease_owner", _Id),
    Column("lease_until", Float),
    # Grows with every lease: what a former holder still wants to record is refused by it.
    Column("epoch", Integer, nullable=False),
    Index("ix_shards_batch_id_id", "batch_id", "id"),
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

small_indexes = Table(
    "small_indexes",
    metadata,
    # By the batch's number, so that they are stored one after the other.
    Column("batch_seq", _Serial, ForeignKey("batches.seq"), primary_key=True, autoincrement=False),
    # As in a blob.
    Column("content", LargeBinary, nullable=False),
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
    # Results recorded a second, while there was work.
    Column("rate", Float, nullable=False, server_default=text("0")),
    # What else it says of itself, as JSON: what `/metrics` shows.
    Column("snapshot", LargeBinary),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", _Id, nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    # SHA-256 of the key, as hex; the key itself has 256 random bits and is kept nowhere.
    Column("hash", String(64), nullable=False, unique=True),
    # Its last characters, by which people tell keys apart.
    Column("hint", String(8), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    # Null for no limit.
    Column("max_queued_requests", BigInteger),
    Column("max_live_batches", BigInteger),
    Column("max_upload_bytes", BigInteger),
    # Where the end of its batches is told, unless a batch says otherwise, and what that is signed with.
    Column("webhook_url", Text),
    Column("webhook_secret", Text),
    # Of its owner's share of the capacity.
    Column("weight", Integer, nullable=False, server_default=text("1")),
    sqlite_autoincrement=True,
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(64), primary_key=True),
    # What was created: `file` or `batch`.
    Column("kind", String(8), primary_key=True),
    Column("key", String(255), primary_key=True),
    # SHA-256 of what was asked for, as hex, and the id of what came of it.
    Column("fingerprint", String(64), nullable=False),
    Column("object_id", _Id, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_idempotency_keys_created_at", "created_at"),
    Index("ix_idempotency_keys_object_id", "object_id"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("api_key", _Id),
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    # The length that was announced, which the parts must add up to.
    Column("bytes", BigInteger, nullable=False),
    # How long the file is to live, once there is one; null for ever.
    Column("file_expires_after", BigInteger),
    Column("status", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("file_id", _Id),
    Index("ix_uploads_expires_at", "expires_at"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("seq", _Serial, primary_key=True, autoincrement=True),
    Column("id", _Id, nullable=False, unique=True),
    Column("upload_id", _Id, ForeignKey("uploads.id"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("md5", String(32), nullable=False),
    Column("blob_key", String(128), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_upload_parts_upload_id", "upload_id"),
    sqlite_autoincrement=True,
)

webhooks = Table(
    "webhooks",
    metadata,
    # The event's id; a receiver that gets it twice knows it by this.
    Column("id", _Id, primary_key=True),
    Column("batch_id", _Id, nullable=False),
    Column("type", String(32), nullable=False),
    Column("url", Text, nullable=False),
    # Of the URL: so that one slow receiver does not take all there is.
    Column("host", Text, nullable=False),
    Column("secret", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    # When it is to be sent next; null once it was delivered or given up.
    Column("next_at", Float),
    Column("delivered_at", BigInteger),
    # What the last attempt failed with.
    Column("error", Text),
    Index("ix_webhooks_next_at", "next_at"),
    Index("ix_webhooks_created_at", "created_at"),
)

dead_blobs = Table(
    "dead_blobs",
    metadata,
    # A blob that nothing refers to any more. Written in the transaction that took the last reference away, so that no
    # crash can leave a blob behind; the sweep deletes the blob some time later, and then this row.
    Column("key", String(128), primary_key=True),
    Column("since", Float, nullable=False),
    Index("ix_dead_blobs_since", "since"),
)

identity = Table(
    "identity",
    metadata,
    # There is one row, and this is 1.
    Column("only", SmallInteger, primary_key=True, autoincrement=False),
    # Which database this is: a blob store carries the same id, so that nothing is swept that another database knows.
    Column("id", _Id, nullable=False),
)
