"""Giving out result lines as they land in files, each once, for those who want to see them before the end."""

from __future__ import annotations

from collections.abc import Callable

from batchery.client.collect import Collector


class Tap:
    """Reads what has landed behind what was read before. For one thread, that of the collector.

    Args:
        collector: whose files they are.
        on_line: given each line, with its line break; those of the output before those of the errors.
    """

    def __init__(self, collector: Collector, on_line: Callable[[bytes], object]) -> None:
        self._sinks = (collector.output, collector.errors)
        self._on_line = on_line
        self._told = [0, 0]

    def give(self) -> None:
        """Give out the lines that are new."""
        for number, sink in enumerate(self._sinks):
            sink.file.flush()
            if not sink.file.path.exists():
                continue
            with sink.file.path.open("rb") as file:
                file.seek(self._told[number])
                for line in file:
                    self._told[number] += len(line)
                    self._on_line(line)
