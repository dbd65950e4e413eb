"""The exit codes of the scripts, and the error that carries one. It must never print or exit by itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Callable, NoReturn

OK = 0
USAGE = 1
INVALID_INPUT = 2
SOME_FAILED = 3
BATCH_FAILED = 4
NOT_ALLOWED = 5
CONNECTION_LOST = 6
STILL_RUNNING = 8
DETACHED = 130

TABLE = """exit codes:
  0 all well   1 wrong command line or answer   2 the input is invalid, nothing was sent   3 some requests failed
  4 the batch failed, expired or was cancelled   5 key or quota refused   6 connection lost: run the same command again
  8 still running: run the same command again   130 stopped by Ctrl-C: run the same command again"""


class StopError(Exception):
    """Ends a script.

    Args:
        message: for a person: what is wrong, and what to do.
        code: the exit code.
    """

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """An argument parser with our exit code for a wrong command line, and examples that keep their line breaks."""

    def __init__(self, description: str, examples: str, **more: Any) -> None:
        super().__init__(
            description=description,
            epilog="examples:\n" + examples.rstrip() + "\n\n" + TABLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, "%s: %s\n" % (self.prog, message))


def file_to_write(text: str) -> Path:
    """The path of a file that a script is going to write, for argparse."""
    path = Path(text)
    if not path.name or path.is_dir():
        raise argparse.ArgumentTypeError("%s is a folder; name a file" % (text or "''"))
    return path


def run(main: Callable[[], int], detached: str) -> NoReturn:
    """Call `main` and end the process with its code, or with that of the error that stopped it.

    Args:
        main: the script.
        detached: what to say after Ctrl-C.
    """
    try:
        code = main()
        sys.stdout.flush()
    except StopError as error:
        print("error: %s" % error, file=sys.stderr)
        code = error.code
    except KeyboardInterrupt:
        print("\nstopped. %s" % detached, file=sys.stderr)
        code = DETACHED
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        sys.stderr.close()
        code = USAGE
    except OSError as error:
        told = "%s: %s" % (error.filename, error.strerror) if error.filename and error.strerror else str(error)
        print("error: %s" % told, file=sys.stderr)
        code = USAGE
    sys.exit(code)
