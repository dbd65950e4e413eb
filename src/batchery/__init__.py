"""batchery: batch inference, whole. A server, a client and the engine between them.

What is here for programs is imported when it is first asked for, so that `import batchery` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchery.client.errors import (
        ApiError,
        AuthError,
        ClientError,
        ConnectionLostError,
        InputError,
        OverCostError,
        SettingsError,
    )
    from batchery.sdk.async_client import AsyncClient
    from batchery.sdk.async_job import AsyncBatchJob
    from batchery.sdk.client import Client
    from batchery.sdk.job import BatchJob
    from batchery.sdk.openai_client import AsyncOpenAI
    from batchery.sdk.row_result import RowResult

__version__ = "0.1.0"

__all__ = [
    "ApiError",
    "AsyncBatchJob",
    "AsyncClient",
    "AsyncOpenAI",
    "AuthError",
    "BatchJob",
    "Client",
    "ClientError",
    "ConnectionLostError",
    "InputError",
    "OverCostError",
    "RowResult",
    "SettingsError",
    "__version__",
]

_HOMES = {
    "AsyncBatchJob": "batchery.sdk.async_job",
    "AsyncClient": "batchery.sdk.async_client",
    "AsyncOpenAI": "batchery.sdk.openai_client",
    "BatchJob": "batchery.sdk.job",
    "Client": "batchery.sdk.client",
    "RowResult": "batchery.sdk.row_result",
}


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name not in __all__:
        raise AttributeError(f"module 'batchery' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES.get(name, "batchery.client.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
