"""What a command asked of a job, and how it wants to be told."""

from __future__ import annotations

from batchery.cli.failures import tell
from batchery.client.job_request import JobRequest


class Request(JobRequest, frozen=True, kw_only=True):
    """What was asked for on the command line; see the options of `run`."""

    dry_run: bool = False
    quiet: bool = False
    as_json: bool = False

    def say(self, text: str) -> None:
        """Tell the user something that is not an error."""
        if not self.quiet:
            tell(text)
