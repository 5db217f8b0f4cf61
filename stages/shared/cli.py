"""How a stage runs and ends: a user's mistake in one line and exit code 1, a bug in a traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from errno import EACCES, EDQUOT, EIO, ENOSPC, EPERM, EROFS
from functools import partial
from typing import Any

from stages.shared.errors import UserError


def run(main: Callable[..., None], arguments: dict[str, dict[str, Any]] | None = None) -> None:
    """Run `main` as a command line, its module's docstring being the `--help`.

    A stage has no arguments. Those of a tool have the options of `add_argument` and go to `main`.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules[main.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, options in (arguments or {}).items():
        parser.add_argument(name, **options)
    values = vars(parser.parse_args())
    if line := error_line(partial(main, **values)):
        sys.exit(line)


def error_line(main: Callable[[], None]) -> str | None:
    """Call `main`; return the line that tells why it ended early, None if it did not."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        return f"error: {error}"
    except BrokenPipeError:  # who reads what is printed, such as `head`, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (EACCES, EDQUOT, EIO, ENOSPC, EPERM, EROFS):
            raise
        return f"error: {error.filename or 'disk'}: {error.strerror}; fix that and rerun"
    except KeyboardInterrupt:
        return "interrupted"
    return None
