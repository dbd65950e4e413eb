"""The receipt of a job: what was asked for and what came of it, for people and for programs, kept beside the output."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from batchery.client.errors import SettingsError
from batchery.client.objects import Deduplicated
from batchery.client.state import JobFolder, sync_folder


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a job.

    Attributes:
        exit_code: of the command.
        status: of the batches, each once.
        server: who ran it.
        rows, ok, failed, not_run: of the inputs.
        input_tokens, output_tokens, cached_tokens: None where nobody says.
        deduplicated: requests that were answered by another's answer, and the tokens that this saved, which are not in
            the counts above; None where that was not asked for, or the server does not do it.
        cost: in `currency`; None where no price is known.
        began_at, ended_at: Unix seconds; elapsed_s between them, rows_per_s while this run followed.
        window: the completion window.
        deadline: Unix seconds; None where none was set.
        deadline_met: whether it ended before; None without a deadline.
        retries: how often failed rows were run again.
        output, errors: the files, if there are any.
        batches: their ids.
        reasons: why rows failed, with how many and the cause.
        problems: why batches failed as a whole.
        simulated: no model answered.
        inputs: the SHA-256 of each.
    """

    exit_code: int
    status: str
    server: str
    rows: int
    ok: int
    failed: int
    not_run: int
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    deduplicated: Deduplicated | None = None
    cost: float | None = None
    currency: str | None = None
    began_at: float = 0.0
    ended_at: float = 0.0
    elapsed_s: float = 0.0
    rows_per_s: float = 0.0
    window: str = ""
    deadline: float | None = None
    deadline_met: bool | None = None
    retries: int = 0
    output: str | None = None
    errors: str | None = None
    batches: list[str] = []
    reasons: list[dict[str, Any]] = []
    problems: list[str] = []
    simulated: bool = False
    inputs: list[str] = []


def save_receipt(folder: JobFolder, receipt: Receipt) -> None:
    """Keep a receipt, and return when it is on disk."""
    path = folder.receipt_path
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(receipt)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(folder.path)


def load_receipt(folder: JobFolder) -> Receipt | None:
    """The receipt of the job that has ended here; None if there is none.

    Raises:
        SettingsError: there is one that cannot be read.
    """
    try:
        return msgspec.json.decode(folder.receipt_path.read_bytes(), type=Receipt)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise SettingsError(f"the receipt {folder.receipt_path} cannot be read: {error}") from None
