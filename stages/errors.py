"""How a stage ends: a user's mistake in one line with exit code 1, a bug with its traceback."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend, told in one line: file or key, problem, remedy."""


def run(main: Callable[[], None]) -> None:
    """Run `main` as a command line without options, its module's docstring being the `--help`."""
    argparse.ArgumentParser(
        description=sys.modules[main.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except PermissionError as error:
        sys.exit(f"error: {error.filename}: permission denied; mend that and rerun")
    except KeyboardInterrupt:
        sys.exit("interrupted")
