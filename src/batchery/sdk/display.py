"""Showing a job where it runs: as HTML in a notebook, kept up to date while it runs, and as the command shows it on a
terminal.
"""

from __future__ import annotations

import sys
import time
from html import escape
from typing import TYPE_CHECKING, Any

from batchery.client.job import Progress
from batchery.client.progress import Display, Nothing, Terminal, display_for, duration, saving
from batchery.client.receipt import Receipt

if TYPE_CHECKING:
    from batchery.sdk.row_result import RowResult

REDRAW = 0.5  # seconds between two pictures in a notebook
SHOWN = 5
"""Rows of a finished job that its picture shows."""


def display_of(job: Any, wanted: bool | None) -> Display:
    """What shows the progress of a job.

    Args:
        job: with a `_repr_html_`.
        wanted: None to show it in a notebook and on a terminal, and nothing elsewhere.
    """
    if wanted is False:
        return Nothing()
    if _in_notebook():
        return Notebook(job)
    if wanted:
        return display_for(sys.stderr, quiet=False)
    return Terminal(sys.stderr) if sys.stderr.isatty() else Nothing()


def _in_notebook() -> bool:
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return getattr(shell, "kernel", None) is not None


class Notebook:
    """The picture of a job below its cell, redrawn in place.

    Args:
        job: with a `_repr_html_`.
    """

    def __init__(self, job: Any) -> None:
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415

        self._job = job
        self._drawn = time.monotonic()
        self._handle: Any = display(job, display_id=True)

    def update(self, progress: Progress) -> None:
        """Redraw, unless that was a moment ago."""
        now = time.monotonic()
        if now - self._drawn >= REDRAW or progress.finished:
            self._drawn = now
            self._handle.update(self._job)

    def close(self) -> None:
        """Draw the end."""
        self._handle.update(self._job)


def html_of(
    name: str,
    progress: Progress | None,
    receipt: Receipt | None,
    error: BaseException | None,
    results: list[RowResult[Any]],
) -> str:
    """A job as HTML: how far it is, and at its end what came of it. All text from elsewhere is escaped.

    Args:
        name: of the job.
        progress: where it is; None before it began.
        receipt: how it ended; None while it runs.
        error: why it stopped; None if it did not.
        results: of some rows.
    """
    facts: dict[str, str] = {}
    if receipt is not None:
        done, rows, phase = receipt.ok, receipt.rows, receipt.status
        facts["rows"] = f"{receipt.ok} ok, {receipt.failed} failed, {receipt.not_run} not run of {receipt.rows}"
        facts["time"] = duration(receipt.elapsed_s)
        if receipt.input_tokens is not None:
            facts["tokens"] = f"{receipt.input_tokens} in, {receipt.output_tokens} out"
        if (saved := saving(receipt.deduplicated)) is not None:
            facts["saved"] = saved
        if receipt.cost is not None:
            facts["cost"] = f"${receipt.cost:.4f}"
        if receipt.output is not None:
            facts["output"] = receipt.output
        if receipt.simulated:
            facts["note"] = "simulated: no model answered"
        for reason in receipt.reasons[:SHOWN]:
            facts[f"{reason['rows']} rows"] = str(reason["reason"])
    else:
        done = progress.completed if progress else 0
        rows = progress.rows if progress else 0
        phase = progress.phase if progress else "starting"
        facts["rows"] = f"{done} of {rows} done, {progress.failed if progress else 0} failed"
        if progress and progress.cost is not None:
            facts["cost so far"] = f"${progress.cost:.4f}"
    if error is not None:
        phase = "stopped"
        facts["why"] = str(error)
    share = 100 * done / rows if rows else 0
    table = "".join(f"<tr><th>{escape(key)}</th><td>{escape(text)}</td></tr>" for key, text in facts.items())
    bar = f'<progress value="{done}" max="{max(rows, 1)}" style="width: 20em"></progress> {share:.0f}%'
    return (
        f'<div class="batchery-job"><b>{escape(name)}</b> {escape(phase)}<br>{bar}<table>{table}</table>'
        f"{_rows_of(results)}</div>"
    )


def _rows_of(results: list[RowResult[Any]]) -> str:
    if not results:
        return ""
    rows = "".join(
        f"<tr><td>{escape(result.custom_id)}</td><td>{result.status}</td>"
        f"<td>{escape((result.text or (result.error.message if result.error else ''))[:200])}</td></tr>"
        for result in results
    )
    return f"<table><tr><th>custom_id</th><th>status</th><th>answer</th></tr>{rows}</table>"
