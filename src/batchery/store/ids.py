"""New ids: 128 random bits from the operating system, so that nobody can guess one."""

import secrets


def new_id() -> str:
    """A bare id, 32 hex digits."""
    return secrets.token_hex(16)
