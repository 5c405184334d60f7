"""A rank under Paddle's launcher is two processes: the launcher's child is a stand-in, and the run is its child.

The launcher kills (SIGKILL) processes that are alive 30 s after its SIGTERM, however long a step and a checkpoint take.
It can kill only the stand-in. The run, in a session of its own, ends with its stand-in unless it has been asked to
stop: then it finishes its step and checkpoint, and ends by itself.

The fork happens when the package is imported, while the process has one thread, little memory and no GPU context. A run
that forked only when it is asked to stop would have threads of Paddle, whose locks the child would inherit, and a GPU
that the child could not use; and a step that takes longer than the launcher waits would be lost.
"""

import os
import select
import signal
import sys
import time

from ppdiffusers_train.launcher.last_word import ADDRESS, note_status, print_after_launcher
from ppdiffusers_train.launcher.signals import (
    ASKS,
    INSISTS,
    LAUNCHER_ENDED,
    LAUNCHER_SECONDS,
    REPETITION_SECONDS,
    STOP_SIGNALS,
    WARNINGS,
    Patience,
    end_with_launcher,
    name_of,
    signal_at_parents_end,
)

END_SECONDS = 10.0  # after which a run that has nothing to finish is killed
HEARD = {*STOP_SIGNALS, *WARNINGS, LAUNCHER_ENDED, signal.SIGCHLD}

_stand_in = None  # process id
_to_stand_in = None  # a pipe


def leave_stand_in() -> None:
    """If Paddle's launcher has started this process, continue in a child, whose stand-in this process becomes."""
    global _stand_in, _to_stand_in
    if sys.platform != "linux" or "paddle" in sys.modules or ADDRESS is None:
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
    end_with_launcher()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def is_left_alone() -> bool:
    """Whether this process had a stand-in that has ended."""
    return _stand_in not in (None, os.getppid())


def ask_for_time() -> None:
    """Signal to the stand-in that from now on this process needs time to finish when it is asked to stop."""
    if _to_stand_in is not None:
        os.write(_to_stand_in, b".")


def ignore_signals_from_now_on() -> None:
    """In a process that has a stand-in, once its work is done or has failed: it ends by itself, with its own status."""
    if _to_stand_in is not None:
        for number in (*STOP_SIGNALS, *WARNINGS, LAUNCHER_ENDED):
            signal.signal(number, signal.SIG_IGN)


def stand_in_for(run: int, from_run: int) -> int:
    """Forward signals to a child until it has ended; returns its status in the format of `os.waitpid`.

    Args:
        from_run: a pipe that is readable once the run has called `ask_for_time`.
    """
    patience = Patience()
    while True:
        number, seconds, message = signal.sigwait(HEARD), 0.0, None  # seconds until the run is killed, with a message
        heard = patience.hear(number) if number != signal.SIGCHLD else None
        if heard == ASKS:
            has_time = number in WARNINGS or select.select([from_run], [], [], 0)[0]
            if not has_time:
                # Or a rank that gets the signal later would fail, because others have ended.
                time.sleep(until_last_is_signalled())
                # A run that waits for others inside Paddle does not handle the signal.
                seconds, message = END_SECONDS, "ended by {}"
            os.kill(run, number)
        elif heard == INSISTS:
            # The launcher's last SIGTERM, after 30 s, comes a moment before SIGKILL, which only this process receives.
            seconds, message = REPETITION_SECONDS, "{} again: ended at once"
        status = wait_for_end(run, seconds)
        if status is None and message:
            os.kill(run, signal.SIGKILL)
            os.waitpid(run, 0)
            return ended_by(number, message)
        if status is not None:
            by_signal = os.WIFSIGNALED(status) and os.WTERMSIG(status) in HEARD  # before it had a handler
            return ended_by(os.WTERMSIG(status), "ended by {}") if by_signal else status


def until_last_is_signalled() -> float:
    """Seconds until the launcher, which signals the ranks of this machine one by one, has signalled the last."""
    ranks, rank = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)), int(os.environ.get("PADDLE_LOCAL_RANK", 0))
    return LAUNCHER_SECONDS * (ranks - 1 - rank)


def wait_for_end(run: int, seconds: float):
    """A child's status, or None if it is still alive after so many seconds."""
    signal.sigtimedwait({signal.SIGCHLD}, seconds)
    ended, status = os.waitpid(run, os.WNOHANG)
    return status if ended else None


def ended_by(number: int, message: str) -> int:
    """Print which signal ended a run; returns its status in the format of `os.waitpid`."""
    message = message.format(name_of(number))
    print_after_launcher(message)
    print(message, flush=True)
    return (128 + number) << 8


def end_like(status: int) -> None:
    """End this process with the status of a child."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
