"""What the client's errors say, in the words of a program: its parameters, where the command has options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from batchery.client.errors import ClientError, InputError, InputProblem

SHOWN = 10
"""Problems of an input that the text of its error names; `problems` has more."""

_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")


@contextmanager
def in_words_of_programs() -> Iterator[None]:
    """Errors of the client that pass say `max_cost` where they said `--max-cost`, and what is wrong with an input."""
    try:
        yield
    except ClientError as error:
        raise reworded(error)  # noqa: B904 - it is the same error


def reworded(error: ClientError) -> ClientError:
    """The error itself, with its text in the words of a program."""
    text = str(error)
    if isinstance(error, InputError) and "\n" not in text:
        error.problems = tuple(map(reworded_problem, error.problems))
        lines = [text, *(f"  {problem.message}" for problem in error.problems[:SHOWN])]
        if error.count > SHOWN:
            lines.append(f"  and {error.count - SHOWN} more")
        text = "\n".join(lines)
    error.args = (_in_words(text), *error.args[1:])
    return error


def reworded_problem(problem: InputProblem) -> InputProblem:
    """A problem of an input, with its text in the words of a program."""
    return msgspec.structs.replace(problem, message=_in_words(problem.message))


def _in_words(text: str) -> str:
    return _OPTION.sub(lambda match: match[1].replace("-", "_"), text)
