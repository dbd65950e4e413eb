"""Batches that exist already, without the inputs they were made of: following them, and fetching their results.

It changes nothing at the server. What it fetches it keeps in a folder of its caller, so that memory stays flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from batchery.client.collect import Collector
from batchery.client.follow import Follower
from batchery.client.http import Api
from batchery.client.index import ResultIndex
from batchery.client.inputs import Input
from batchery.client.objects import Batch, read_batch
from batchery.client.output import LineFile
from batchery.client.results import read_result
from batchery.client.state import JobState, Landed, new_part
from batchery.client.tap import Tap


def follow_batches(api: Api, ids: Sequence[str], on_batch: Callable[[int, Batch], None]) -> list[Batch]:
    """Follow batches until each is terminal.

    Args:
        api: the server.
        ids: which.
        on_batch: told of each piece of news, with the number of the batch among `ids`.

    Raises:
        ClientError: one of them cannot be followed.
    """
    follower = Follower(api)
    found: dict[int, Batch] = {}
    for number, batch_id in enumerate(ids):
        follower.add(number, batch_id, is_new=False)
    while any(number not in found or not found[number].terminal for number in range(len(ids))):
        news = follower.next(1.0)
        if news is None:
            api.pause(0)  # raises if the client was closed
            continue
        if news.error is not None:
            raise news.error
        assert news.batch is not None
        on_batch(news.part, news.batch)
        found[news.part] = news.batch
        follower.done(news)
    return [found[number] for number in range(len(ids))]


class Fetching:
    """The results of some batches, on their way. Close it at the end.

    Args:
        api: the server.
        ids: which batches.
        folder: an empty folder for `results.jsonl` and `errors.jsonl`.
        on_line: given each result line as it lands.
    """

    def __init__(self, api: Api, ids: Sequence[str], folder: Path, on_line: Callable[[bytes], object]) -> None:
        self._api = api
        self._ids = ids
        self._folder = folder
        self._on_line = on_line
        self.files = (folder / "results.jsonl", folder / "errors.jsonl")
        state = JobState(api.server.base_url, "", [], [], Landed([]), Landed([]))
        for batch_id in ids:
            part = new_part(Input("", 0, "", 0, ""), "/")
            part.batch_id = batch_id
            state.add(part)
        self._collector = Collector(api, state, lambda: None, *self.files, lambda: None)
        self._tap = Tap(self._collector, on_line)

    def now(self) -> list[Batch]:
        """Fetch what there is by now; the batches as they are.

        Raises:
            ClientError: something could not be fetched.
        """
        batches = []
        for number, batch_id in enumerate(self._ids):
            batch = read_batch(self._api.get_batch(batch_id).value)
            self._collect(number, batch)
            batches.append(batch)
        return batches

    def to_the_end(self, on_batch: Callable[[int, Batch], None]) -> list[Batch]:
        """Fetch until each batch is terminal and everything is here; the batches as they ended.

        Args:
            on_batch: told of each piece of news, once its lines are here.

        Raises:
            ClientError: something could not be fetched.
        """

        def heard(number: int, batch: Batch) -> None:
            self._collect(number, batch)
            on_batch(number, batch)

        return follow_batches(self._api, self._ids, heard)

    def close(self) -> None:
        """Close the files."""
        self._collector.close()

    def _collect(self, number: int, batch: Batch) -> None:
        self._collector.collect(number, batch)
        self._tap.give()
        if batch.terminal and number in self._collector.resumed:
            self._give_missed(batch)

    def _give_missed(self, batch: Batch) -> None:
        """Give out what was passed over by going on after the lines that were here, on a server that puts what lands
        late among lines that it gave out already: one line came twice then, and another not at all.
        """
        self._collector.sync()
        anew = self._folder / "anew.jsonl"
        with ResultIndex(self._folder / "seen.sqlite", self.files) as index:
            if not index.repeats:
                return
            file = LineFile(anew)
            try:
                self._collector.fetch_anew(batch, file)
            finally:
                file.close()
            with anew.open("rb") as lines:
                for line in lines:
                    custom_id = read_result(line).custom_id
                    if custom_id is not None and index.get(custom_id) is None:
                        self._on_line(line)
        anew.unlink()
