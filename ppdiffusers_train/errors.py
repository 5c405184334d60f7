"""A mistake or a failed run becomes one line and an exit status, never a traceback."""

import functools
import os
import re
import sys

from ppdiffusers_train.launcher.final_message import print_after_launcher, watch_launcher
from ppdiffusers_train.launcher.signals import ExitOnSignal
from ppdiffusers_train.launcher.supervisor import ignore_signals_from_now_on
from ppdiffusers_train.launcher.tokens import secrets_in


class UserError(Exception):
    """A mistake in the user's input. The message names the flag or file, what was found and what is expected."""

    exit_status = 2


class BadSampleError(UserError):
    """A sample of the data cannot be used. The message names the file or row and the reason."""


class RunError(Exception):
    """The run cannot continue, although its flags are right. The message names the step or file."""

    exit_status = 1


class MissingImagesError(RunError):
    """The result is complete, but validation images could not be generated."""

    exit_status = 3


SHORTEST_SECRET = 6  # characters; a shorter value may occur in any text


def hide_tokens(text: str) -> str:
    """A text in which access tokens are masked: those of the command line and the environment, tokens of the hub, and
    what follows the word bearer."""
    given = [word.partition("=")[2] for word in sys.argv if word.startswith("--hub_token=")]
    given += [word for flag, word in zip(sys.argv, sys.argv[1:]) if flag == "--hub_token"]
    given += [value for value in secrets_in(os.environ).values() if len(value) >= SHORTEST_SECRET]
    for token in filter(None, given):
        text = text.replace(token, "***")
    return re.sub(r"hf_\w{8,}|(?i:(bearer\s+)[^\s'\"]+)", lambda match: f"{match[1] or ''}***", text)


def one_line_errors(main):
    """Wrap `main(argv)`: the errors above are printed as one line to standard error and end the process.

    Other errors keep their traceback. A signal that has no handler yet ends the process with one line, too.
    With several ranks, the error of the first that fails or is killed is the last line on the screen.
    """

    @functools.wraps(main)
    def run(argv=None):
        watch_launcher()
        try:
            with ExitOnSignal():
                try:
                    return main(argv)
                finally:
                    ignore_signals_from_now_on()
        except (UserError, RunError) as error:
            message = hide_tokens(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}")
            print_after_launcher(message)
            print(message, file=sys.stderr)
            raise SystemExit(error.exit_status) from error
        except Exception as error:
            # The traceback goes to a log file.
            error.args = tuple(hide_tokens(part) if isinstance(part, str) else part for part in error.args)
            rank = os.environ.get("PADDLE_TRAINER_ID", "0")
            print_after_launcher(hide_tokens(f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}"))
            raise

    return run
