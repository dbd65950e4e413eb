"""Every way a job can end other than well, as one tree.

    ClientError
    ├── SettingsError            an option, a path or an environment variable is wrong; nothing was sent
    ├── InputError               an input has bad lines; nothing was sent
    ├── OverCostError            it would cost more than it may, or nobody knows what it costs; nothing was sent
    ├── ResumeError              what was saved and what is asked for now do not agree; nothing was sent
    ├── ConnectionLostError      the server could not be reached for longer than the client is patient; resumable
    │   └── BrokenOffError       a body ended too early; what came before is good, and the rest can be asked for
    ├── DetachedError            the client was told to stop following; the job goes on and can be resumed
    ├── UnexpectedAnswerError    what answered does not speak this API
    └── ApiError                 the server said no
        ├── AuthError            401, 403
        ├── QuotaError           402, and 429 that would not pass
        ├── NotFoundError        404
        └── ServerError          5xx that would not pass; resumable

Messages are for people: they name the thing, the reason and what to do. They never hold a key.
"""

from __future__ import annotations

import msgspec


class ClientError(Exception):
    """Base of everything this package raises on purpose."""


class SettingsError(ClientError):
    """An option, a path or an environment variable is wrong."""


class InputProblem(msgspec.Struct, frozen=True):
    """Something wrong in an input file.

    Attributes:
        path: the file as it was named.
        line: physical line, from 1; None where the whole file is meant.
        code: one of the validation codes of the wire contract.
        message: what is wrong and what would be accepted.
    """

    path: str
    line: int | None
    code: str
    message: str


class InputError(ClientError):
    """An input has bad lines.

    Args:
        problems: the first of them, in order.
        count: how many there are in all.
    """

    def __init__(self, problems: tuple[InputProblem, ...], count: int) -> None:
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the input; nothing was sent")
        self.problems = problems
        self.count = count


class OverCostError(ClientError):
    """The job would cost more than it may, or nobody knows what it costs."""


class ResumeError(ClientError):
    """What was saved and what is asked for now do not agree."""


class ConnectionLostError(ClientError):
    """The server could not be reached, or broke off, for longer than the client is patient."""


class BrokenOffError(ConnectionLostError):
    """A body ended too early."""


class DetachedError(ClientError):
    """The client was told to stop following."""


class UnexpectedAnswerError(ClientError):
    """What answered does not speak this API."""


class ApiError(ClientError):
    """The server said no.

    Args:
        message: what it said.
        status: the HTTP status.
        code: its machine-readable cause, where it gave one.
        request_id: its `x-request-id`, for asking the people who run it.
        param: the field of the request that it is about, where it named one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        request_id: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.request_id = request_id
        self.param = param


class AuthError(ApiError):
    """401 or 403: the key is missing, unknown or not allowed to do this."""


class QuotaError(ApiError):
    """402, or a 429 that would not pass: out of credit, quota or capacity."""


class NotFoundError(ApiError):
    """404: it does not exist, or belongs to somebody else."""


class ServerError(ApiError):
    """5xx that would not pass."""


def error_for_status(status: int) -> type[ApiError]:
    """The class of an HTTP error status."""
    if status in (401, 403):
        return AuthError
    if status in (402, 429):
        return QuotaError
    if status == 404:
        return NotFoundError
    return ServerError if status >= 500 else ApiError
