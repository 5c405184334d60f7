"""A mistake or a failed run becomes one line and an exit status, never a traceback."""

import functools
import os
import sys


class UserError(Exception):
    """Something the user gave is wrong. The message names the flag or file, what was found and what is expected."""

    exit_status = 2


class BadSampleError(UserError):
    """A sample of the data cannot be used. The message names the file or row, and why."""


class RunError(Exception):
    """The run cannot go on, through no mistake of its flags. The message says where it stands."""

    exit_status = 1


def one_line_errors(main):
    """Wrap `main(argv)`: the errors above are printed as one line to standard error and end the process."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except (UserError, RunError) as error:
            message = " ".join(str(error).split())
            print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
            raise SystemExit(error.exit_status) from error

    return run
