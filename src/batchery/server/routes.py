"""The routes of the API, each to be served under every base path."""

from __future__ import annotations

from batchery.server import (
    batches,
    complete_upload,
    create_batch,
    delete_batch,
    events,
    files,
    metrics,
    results,
    retry,
    system,
    uploads,
    validate,
)

API = (
    files.create_file,
    files.list_files,
    files.get_file,
    files.delete_file,
    files.get_content,
    uploads.create_upload,
    uploads.get_upload,
    uploads.add_part,
    complete_upload.complete_upload,
    uploads.cancel_upload,
    create_batch.create_batch,
    validate.validate_batch,
    batches.list_batches,
    batches.get_batch,
    batches.cancel_batch,
    events.get_events,
    delete_batch.delete_batch,
    retry.retry_batch,
    results.list_results,
    system.list_models,
)

HEALTH = (system.healthz, system.readyz, metrics.get_metrics)
