"""The result indexes of small batches, as rows."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "small_indexes",
        sa.Column(
            "batch_seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False
        ),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["batch_seq"], ["batches.seq"], name="fk_small_indexes_batch_seq"),
        sa.PrimaryKeyConstraint("batch_seq", name="pk_small_indexes"),
    )
