"""The routes of the API, each to be served under every base path."""

from __future__ import annotations

from batchery.server import batches, files, system

API = (
    files.create_file,
    files.list_files,
    files.get_file,
    files.delete_file,
    files.get_content,
    batches.create_batch,
    batches.list_batches,
    batches.get_batch,
    batches.cancel_batch,
    system.list_models,
)

HEALTH = (system.healthz, system.readyz)
