"""A rank under Paddle's launcher is two processes: the launcher's child stands in for the run, which is its own child.

The launcher kills (SIGKILL) what still lives 30 s after its SIGTERM, however long a step and a checkpoint take. It can
kill the stand-in only. The run, in a session of its own, ends with its stand-in as long as nobody has asked it to stop;
from then on it finishes step and checkpoint, and ends by itself.

This happens while the package is imported, when the process has one thread, little memory and no GPU yet. A run that
forks when it is asked to stop has threads of Paddle, whose locks the child would inherit, and a GPU, which it could not
use; and a step that takes longer than the launcher waits would be lost.
"""

import os
import select
import signal
import sys
import time

from ppdiffusers_train.launcher.last_word import PARENT, is_launcher, note_status
from ppdiffusers_train.launcher.signals import (
    ASKS,
    INSISTS,
    LAUNCHER_SECONDS,
    REPETITION_SECONDS,
    STOP_SIGNALS,
    WARNINGS,
    Patience,
    signal_at_parents_end,
)

LAUNCHER_ENDED = signal.SIGHUP
END_SECONDS = 10.0  # in which a run that has nothing to finish has to end
HEARD = {*STOP_SIGNALS, *WARNINGS, LAUNCHER_ENDED, signal.SIGCHLD}

_stand_in = None  # number of the process
_to_stand_in = None  # a pipe


def leave_stand_in() -> None:
    """Where Paddle's launcher has started this process: go on in a child, and stand in for it here until it ends."""
    global _stand_in, _to_stand_in
    if sys.platform != "linux" or "paddle" in sys.modules or not is_launcher(PARENT):
        return
    _stand_in = os.getpid()
    from_run, _to_stand_in = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    if run := os.fork():
        signal_at_parents_end(LAUNCHER_ENDED)
        status = stand_in_for(run, from_run)
        note_status(status)
        end_like(status)
    os.close(from_run)
    os.setsid()
    signal_at_parents_end(signal.SIGKILL)
    if is_left_alone():
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def is_left_alone() -> bool:
    """Whether this process had a stand-in that is gone."""
    return _stand_in not in (None, os.getppid())


def ask_for_time() -> None:
    """Tell the stand-in that from now on this process has something to finish when it is asked to stop."""
    if _to_stand_in is not None:
        os.write(_to_stand_in, b".")


def stand_in_for(run: int, from_run: int) -> int:
    """Pass signals on to a child until it has ended; returns its status, as `os.waitpid` has it.

    Args:
        from_run: a pipe from which something can be read once the run has asked for time.
    """
    patience, passed_on = Patience(), set()
    while True:
        number, seconds, message = signal.sigwait(HEARD), 0.0, None  # how long it may live on, and what is said then
        may_insist = number != LAUNCHER_ENDED
        if number == LAUNCHER_ENDED:  # one that was killed could tell nobody to stop
            number = signal.SIGTERM
        heard = patience.hear(number) if number != signal.SIGCHLD else None
        if heard == ASKS:
            has_time = number not in STOP_SIGNALS or select.select([from_run], [], [], 0)[0]
            if not has_time:
                # Or a rank that gets the signal later would fail, because others have ended.
                time.sleep(until_last_is_signalled())
                # One that waits for others, in Paddle, hears nothing.
                seconds, message = END_SECONDS, "ended by {}"
            passed_on.add(number)
            os.kill(run, number)
        elif heard == INSISTS and may_insist:
            # The launcher's last SIGTERM, after 30 s, comes a moment before SIGKILL, which only this process gets.
            seconds, message = REPETITION_SECONDS, "{} again: ended at once"
        status = wait_for_end(run, seconds)
        if status is None and message:
            os.kill(run, signal.SIGKILL)
            os.waitpid(run, 0)
            return ended_by(number, message)
        if status is not None:
            told = os.WIFSIGNALED(status) and os.WTERMSIG(status) in passed_on  # before it could handle any
            return ended_by(os.WTERMSIG(status), "ended by {}") if told else status


def until_last_is_signalled() -> float:
    """Seconds until the launcher, which tells one rank of this machine after the other, has told the last."""
    ranks, rank = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)), int(os.environ.get("PADDLE_LOCAL_RANK", 0))
    return LAUNCHER_SECONDS * (ranks - 1 - rank)


def wait_for_end(run: int, seconds: float):
    """A child's status, or None if it lives on for so many seconds."""
    signal.sigtimedwait({signal.SIGCHLD}, seconds)
    ended, status = os.waitpid(run, os.WNOHANG)
    return status if ended else None


def ended_by(number: int, message: str) -> int:
    """Say by which signal a run was ended; returns its status, as `os.waitpid` has it."""
    print(message.format(signal.Signals(number).name), flush=True)
    return (128 + number) << 8


def end_like(status: int) -> None:
    """End this process as a child has ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
