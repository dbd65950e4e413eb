"""What is asked of a job, as one value, kept beside the job so that it can be asked for again. It holds no key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from batchery.client.errors import SettingsError
from batchery.client.making import Making
from batchery.client.sources import STDIN
from batchery.client.state import JobFolder

REQUEST_FILE = "request.json"


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for; see the options of `batchery run`.

    Attributes:
        deduplicate: have the server send identical deterministic requests once.
        lines_to: a function that is given each result line as it lands; None for none.
    """

    inputs: tuple[str, ...]
    output: Path | None
    making: Making
    base_url: str | None = None
    server: str | None = None
    upstream: str | None = None
    window: str | None = None
    by: str | None = None
    within: str | None = None
    retries: int = 2
    output_format: str | None = None
    max_file_bytes: int | None = None
    max_requests: int | None = None
    endpoint: str | None = None
    api_key_env: str | None = None
    upstream_key_env: str | None = None
    max_in_flight: int | None = None
    data_dir: Path | None = None
    overwrite: bool = False
    prices: str | None = None
    output_tokens: int | None = None
    max_cost: float | None = None
    deduplicate: bool = False
    lines_to: Any = None


R = TypeVar("R", bound=JobRequest)


def save_request(folder: JobFolder, request: JobRequest) -> None:
    """Keep what was asked for, so that the job can be asked for again. It holds no key."""
    inputs = tuple(name if name == STDIN else str(Path(name).absolute()) for name in request.inputs)
    kept = msgspec.structs.replace(request, inputs=inputs, lines_to=None, overwrite=False)
    (folder.path / REQUEST_FILE).write_bytes(msgspec.json.encode(kept, enc_hook=str))


def load_request(folder: JobFolder, kind: type[R]) -> R:
    """What was asked for when the job that is kept here ran last.

    Args:
        folder: the job's.
        kind: as what to read it.

    Raises:
        SettingsError: there is none.
    """
    try:
        content = (folder.path / REQUEST_FILE).read_bytes()
        return msgspec.json.decode(content, type=kind, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.MsgspecError):
        raise SettingsError(f"{folder.path} holds no job that could be run again") from None
