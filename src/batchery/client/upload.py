"""Getting parts to the server: upload, then create, several at once, each paid for once.

What could cost money is written down, and on disk, before it is asked for; an upload costs nothing but time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from batchery.client.errors import ApiError, QuotaError, SettingsError
from batchery.client.http import Api
from batchery.client.inputs import VerifiedFile
from batchery.client.objects import TAG, Batch
from batchery.client.state import JobState, Part
from batchery.client.windows import choose_window, offered_windows

PARALLEL = 4
"""Uploads at once."""

FULL = 30.0
"""Seconds until a batch that the server had no room for, beside those of this job that run, is offered again."""


NOT_DEDUPLICATED = "Warning: this server does not do --deduplicate; every request is sent, and paid for"
"""What to say where a batch for which that was asked has no `deduplicated`."""


class Submitter:
    """Uploads parts and creates their batches. Its methods may be called from several threads.

    Args:
        api: the server.
        state: the job.
        save: writes the state, and returns when it is on disk.
        on_sent: told the bytes sent so far and in all, over all parts of this run.
        is_busy: whether batches of this job run at the server, so that room may come by waiting.
        say: told what the user should know.
    """

    def __init__(
        self,
        api: Api,
        state: JobState,
        save: Callable[[], None],
        on_sent: Callable[[int, int], None],
        is_busy: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._api = api
        self._state = state
        self._save = save
        self._on_sent = on_sent
        self._is_busy = is_busy
        self._say = say
        self._deduplicate = bool(state.deduplicate)
        self._lock = threading.Lock()
        self._window_lock = threading.Lock()
        self._sent: dict[str, int] = {}
        self._size = 0

    def expect(self, part: Part) -> None:
        """Count a part's bytes among those to be sent."""
        if not _is_sent(part):
            self._size += part.source.size

    def submit(self, part: Part) -> Batch | None:
        """Bring a part to where its batch exists; does what is still to be done, and nothing twice.

        Returns:
            The batch if it was created, or found, just now.
        """
        self._upload(part)
        return self._create(part)

    def _upload(self, part: Part) -> None:
        if _is_sent(part):
            return
        source = part.source

        def on_sent(sent: int) -> None:
            with self._lock:
                self._sent[part.upload_key] = sent
                total = sum(self._sent.values())
            self._on_sent(total, self._size)

        name = upload_name(part, self._state)
        part.file_id = self._api.upload(name, source.size, lambda: VerifiedFile(source), part.upload_key, on_sent)
        self._save()

    def _create(self, part: Part) -> Batch | None:
        if part.batch_id is not None:
            return None
        assert part.file_id is not None
        # An earlier run may have asked for this batch and died before the answer.
        batch = self._api.find_batch(part.batch_key) if part.create_sent else None
        while batch is None:
            window = self._state.window
            part.create_sent = True
            self._save()
            try:
                batch = self._api.create_batch(
                    file_id=part.file_id,
                    endpoint=part.endpoint,
                    window=window,
                    metadata={TAG: part.batch_key},
                    key=part.batch_key,
                    tag=part.batch_key,
                    deduplicate=self._deduplicate,
                )
            except QuotaError as error:
                if error.status != 429 or not self._is_busy():
                    raise
                self._api.pause(FULL)
            except ApiError as error:
                if error.param == "deduplicate":
                    self._state.deduplicate = None
                    self._save()
                self._take_other_window(part, window, error)
        part.batch_id = batch.id
        self._save()
        return batch

    def _take_other_window(self, part: Part, refused: str, error: ApiError) -> None:
        """After a refusal of the window that was chosen for a deadline, take the best of those that the server names.

        Raises:
            ApiError: the refusal, if it was about something else, or the user had named the window.
        """
        offered = offered_windows(error)
        if not offered or refused in offered:
            raise error
        part.create_sent = False  # no batch was made, so the user may still name another window
        self._save()
        if self._state.deadline is None:
            raise SettingsError(
                f"the server does not offer the window {refused}. Say --window with one of: {', '.join(offered)}"
            ) from error
        with self._window_lock:
            if self._state.window == refused:
                self._state.window, note = choose_window(offered, self._state.deadline - self._state.began_at)
                self._say(f"The server does not offer the window {refused}; {note}")


def upload_name(part: Part, state: JobState) -> str:
    """The name that a part's file has at the server: the input's, with the piece's number where there are several."""
    path = Path(part.source.path)
    if part.input is None:
        return path.name
    pieces = [other.source for other in state.parts if other.input == part.input]
    if len(pieces) == 1:
        return path.name
    return f"{path.stem}.{pieces.index(part.source) + 1}-of-{len(pieces)}{path.suffix}"


def _is_sent(part: Part) -> bool:
    return part.file_id is not None or part.batch_id is not None
