"""Run a stage or a tool as a command line.

An error that the user can fix ends in one line and exit code 1. A bug keeps its traceback.
"""

import argparse
import os
import sys
from collections.abc import Callable
from errno import EACCES, EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, EPERM, EROFS
from functools import partial
from io import TextIOWrapper
from pathlib import Path

from stages.shared.errors import UserError, escape

# Errors of the machine that the user can fix: permissions, memory, a full or a broken disk.
MACHINE_ERRORS = (EACCES, EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC, EPERM, EROFS)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose `--help` shows `description` as it is, such as a module's docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(main: Callable[..., None], parser: argparse.ArgumentParser | None = None) -> None:
    """Call `main` with the arguments that `parser` finds, and exit with 1 if it ends in an error.

    Without a parser the command has no arguments, and its `--help` is its module's docstring.
    """
    open_standard_streams()
    parser = parser or argument_parser(sys.modules[main.__module__].__doc__)
    arguments = vars(parser.parse_args())
    if line := error_line(partial(main, **arguments)):
        sys.exit(line)


def open_standard_streams() -> None:
    """Open /dev/null in place of standard streams that are closed, as some services have them.

    Standard output escapes a character that the locale's encoding does not have.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):  # not a StringIO of contextlib.redirect_stdout
        sys.stdout.reconfigure(errors="backslashreplace")


def error_line(main: Callable[[], None]) -> str | None:
    """Call `main`. Return None if it succeeds, else the line that explains why it ended.

    Any exception that the user cannot fix is raised again. If the reader of standard output has
    gone, as with `| head`, the process exits with 1 and prints nothing.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        return escape(f"error: {error}")
    except BrokenPipeError:
        # Python flushes standard output again when it exits, so give it a place that accepts all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        place = error.filename or ("memory" if error.errno == ENOMEM else "disk")
        return escape(f"error: {place}: {error.strerror}; fix that and rerun")
    except MemoryError:
        return "error: memory: not enough; close other programs, or raise the limit, and rerun"
    except KeyboardInterrupt:
        return "interrupted"
    return None
