"""A mistake or a failed run becomes one line and an exit status, never a traceback."""

import contextlib
import errno
import functools
import os
import re
import sys
import tempfile
from pathlib import Path

from ppdiffusers_train.launcher.final_message import print_after_launcher, watch_launcher
from ppdiffusers_train.launcher.signals import ExitOnSignal
from ppdiffusers_train.launcher.supervisor import ignore_signals_from_now_on
from ppdiffusers_train.launcher.tokens import secrets_in


class UserError(Exception):
    """A mistake in the user's input. The message names the flag or file, what was found and what is expected."""

    exit_status = 2


class BadSampleError(UserError):
    """A sample of the data cannot be used. The message names the file or row and the reason, on one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class RunError(Exception):
    """The run cannot continue, although its flags are right. The message names the step or file."""

    exit_status = 1


class NotFiniteError(RunError):
    """A loss or a gradient is NaN or inf. The message names step, samples and draws."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}; the last checkpoint is untouched")
        self.reason = reason


class MissingImagesError(RunError):
    """The result is complete, but validation images could not be generated."""

    exit_status = 3


class WriteError(RunError):
    """A file cannot be written. The message names what it is, the folder, and what to do."""


OTHER_FOLDER = "expected a folder in which files can be made"
FAILED_DISK = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space in your quota",
    errno.EFBIG: "the limit of `ulimit -f` or of the file system is too small",
    errno.EIO: "the disk is failing",
    errno.ESTALE: "the folder is gone from the network disk",
}
WAYS_OUT = {
    **FAILED_DISK,
    errno.ENOENT: "the folder does not exist, or no longer does",
    errno.EROFS: "the disk is read-only",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR), OTHER_FOLDER),
}
# As in the messages of safetensors, and of `shutil.copytree`, which lists several errors.
LIBRARY_ERRNO = re.compile(r"(?:\(os error |\[Errno )(\d+)[\])]")


@contextlib.contextmanager
def writing(what: str, folder, consequence: str = "", kind=WriteError):
    """A context in which files are written; every file that a run or a command writes is written in one.

    Args:
        what: what is written, and the flag that chose the folder, if there is one.
        folder: the folder that is written to.
        consequence: the end of the message: what happens to the run, or how to continue it.
        kind: the class of the error, `UserError` if the folder may be the user's mistake. A failing or full disk is
            always a `WriteError`.
    Raises:
        WriteError, or `kind`: the system refused; the message is one line with the reason.
    """
    try:
        yield
    except Exception as error:
        number, reason = reason_of(error)
        if not reason:
            raise
        ways = f" ({WAYS_OUT[number]})" if number in WAYS_OUT else ""
        # The file is named if it is in another folder: the error may come from a file that was being read.
        named = getattr(error, "filename", None)
        is_named = isinstance(named, (str, bytes)) and number not in FAILED_DISK and not is_within(named, folder)
        named = f": {named!r}" if is_named else ""
        end = f"; {consequence}" if consequence else ""
        kind = WriteError if number in FAILED_DISK else kind
        raise kind(f"{what} cannot be written to {str(folder)!r}: {reason}{named}{ways}{end}") from error


@contextlib.contextmanager
def scratch_folder(what: str):
    """A context with a temporary folder. If it cannot be written, the error message calls its contents `what`."""
    with writing(f"TMPDIR: {what}", os.environ.get("TMPDIR", "/tmp")):
        folder = tempfile.TemporaryDirectory()
    with folder as path:
        yield Path(path)


def reason_of(error: Exception) -> tuple:
    """(errno or None, the reason) of an error of the system, whether raised by Python or quoted in a library's message;
    the reason of any other error is empty."""
    if isinstance(error, OSError) and error.errno:
        return error.errno, error.strerror or str(error)
    found = LIBRARY_ERRNO.search(str(error))
    if isinstance(error, OSError) and not found:
        return None, str(error)
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, "")


def is_within(path, folder) -> bool:
    """Whether a path is a folder itself or lies below it."""
    folder = os.path.abspath(folder)
    return os.path.commonpath([os.path.abspath(os.fsdecode(path)), folder]) == folder


SPECIAL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """A text on one line: control characters, line breaks, marks that change the writing direction, and bytes that are
    not valid text, all of which file names may contain, are escaped as in Python."""
    return SPECIAL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@contextlib.contextmanager
def log_errors_ignored():
    """A context for printing: what is printed is lost if the disk with the log file is full. A pipe that nobody reads
    any more is still an error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


def drop_unwritten_output() -> None:
    """Drop what standard output could not write. Python would try again at the end, and exit with status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
                    drop_unwritten_output()
        except (UserError, RunError) as error:
            message = one_line(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}")
            message = hide_tokens(message)
            print_after_launcher(message)
            with log_errors_ignored():
                print(message, file=sys.stderr)
            drop_unwritten_output()
            raise SystemExit(error.exit_status) from error
        except Exception as error:
            # The traceback goes to a log file.
            error.args = tuple(hide_tokens(part) if isinstance(part, str) else part for part in error.args)
            rank = os.environ.get("PADDLE_TRAINER_ID", "0")
            print_after_launcher(hide_tokens(f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}"))
            raise

    return run
