"""What each worker says of itself with its heartbeat."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("snapshot", sa.LargeBinary(), nullable=True))
