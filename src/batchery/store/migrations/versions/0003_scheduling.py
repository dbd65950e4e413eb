"""Shares of owners, when each run began, requests that are answered by one answer, and an index to lease by batch."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ZERO = sa.text("0")


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("weight", sa.Integer(), server_default=sa.text("1"), nullable=False))
    op.add_column("batches", sa.Column("run_started_at", sa.Float(), nullable=True))
    op.add_column("batches", sa.Column("run_done", sa.BigInteger(), server_default=ZERO, nullable=False))
    op.add_column("batches", sa.Column("deduplicate", sa.Boolean(), server_default=sa.false(), nullable=False))
    for name in ("deduplicated", "deduplicated_input_tokens", "deduplicated_output_tokens"):
        op.add_column("batches", sa.Column(name, sa.BigInteger(), server_default=ZERO, nullable=False))
    op.add_column("shards", sa.Column("twins", sa.LargeBinary(), nullable=True))
    op.create_index("ix_shards_batch_id_id", "shards", ["batch_id", "id"], unique=False)
    op.drop_index("ix_shards_batch_id", "shards")
    op.drop_index("ix_shards_deadline", "shards")
