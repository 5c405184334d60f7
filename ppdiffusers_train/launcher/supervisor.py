"""A rank under Paddle's launcher is two processes: the launcher's child is a supervisor, and the run is its child.

The launcher kills (SIGKILL) processes that are alive 30 s after its SIGTERM, however long a step and a checkpoint take.
It can kill only the supervisor. The run, in a session of its own, ends with its supervisor unless it has been asked to
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

from ppdiffusers_train.launcher.final_message import ADDRESS, print_after_launcher, send_status
from ppdiffusers_train.launcher.signals import (
    FIRST,
    LAUNCHER_ENDED,
    LAUNCHER_SECONDS,
    REPETITION_SECONDS,
    SECOND,
    STOP_SIGNALS,
    WARNING_SIGNALS,
    SignalClassifier,
    end_with_launcher,
    signal_at_parents_end,
    signal_name,
)

END_SECONDS = 10.0  # after which a run that has nothing to finish is killed
AWAITED_SIGNALS = {*STOP_SIGNALS, *WARNING_SIGNALS, LAUNCHER_ENDED, signal.SIGCHLD}

_supervisor = None  # process id
_to_supervisor = None  # a pipe


def continue_under_supervisor() -> None:
    """If Paddle's launcher has started this process, continue in a child, whose supervisor this process becomes."""
    global _supervisor, _to_supervisor
    if sys.platform != "linux" or "paddle" in sys.modules or ADDRESS is None:
        return
    _supervisor = os.getpid()
    from_run, _to_supervisor = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED_SIGNALS)
    if run := os.fork():
        signal_at_parents_end(LAUNCHER_ENDED)
        status = supervise(run, from_run)
        send_status(status)
        exit_with(status)
    os.close(from_run)
    os.setsid()
    signal_at_parents_end(signal.SIGKILL)
    if has_lost_supervisor():
        os._exit(1)
    end_with_launcher()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def has_lost_supervisor() -> bool:
    """Whether this process had a supervisor that has ended."""
    return _supervisor not in (None, os.getppid())


def request_time_to_finish() -> None:
    """Signal to the supervisor that from now on this process needs time to finish when it is asked to stop."""
    if _to_supervisor is not None:
        os.write(_to_supervisor, b".")


def ignore_signals_from_now_on() -> None:
    """Ignore signals in a process that has a supervisor, once its work is done or has failed: it ends by itself, with
    its own status."""
    if _to_supervisor is not None:
        for number in (*STOP_SIGNALS, *WARNING_SIGNALS, LAUNCHER_ENDED):
            signal.signal(number, signal.SIG_IGN)


def supervise(run: int, from_run: int) -> int:
    """Forward signals to a child until it has ended; returns its status in the format of `os.waitpid`.

    Args:
        from_run: a pipe that is readable once the run has called `request_time_to_finish`.
    """
    classifier = SignalClassifier()
    while True:
        number = signal.sigwait(AWAITED_SIGNALS)
        seconds, message = 0.0, None  # seconds until the run is killed, with a message
        kind = classifier.classify(number) if number != signal.SIGCHLD else None
        if kind == FIRST:
            has_time = number in WARNING_SIGNALS or select.select([from_run], [], [], 0)[0]
            if not has_time:
                # Or a rank that gets the signal later would fail, because others have ended.
                time.sleep(seconds_until_all_are_signalled())
                # A run that waits for others inside Paddle does not handle the signal.
                seconds, message = END_SECONDS, "ended by {}"
            os.kill(run, number)
        elif kind == SECOND:
            # The launcher's last SIGTERM, after 30 s, comes a moment before SIGKILL, which only this process receives.
            seconds, message = REPETITION_SECONDS, "{} again: ended at once"
        status = wait_for_end(run, seconds)
        if status is None and message:
            os.kill(run, signal.SIGKILL)
            os.waitpid(run, 0)
            return report_signal(number, message)
        if status is not None:
            by_signal = os.WIFSIGNALED(status) and os.WTERMSIG(status) in AWAITED_SIGNALS  # before it had a handler
            return report_signal(os.WTERMSIG(status), "ended by {}") if by_signal else status


def seconds_until_all_are_signalled() -> float:
    """Seconds until the launcher, which signals the ranks of this machine one by one, has signalled the last."""
    ranks, rank = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)), int(os.environ.get("PADDLE_LOCAL_RANK", 0))
    return LAUNCHER_SECONDS * (ranks - 1 - rank)


def wait_for_end(run: int, seconds: float):
    """A child's status, or None if it is still alive after so many seconds."""
    signal.sigtimedwait({signal.SIGCHLD}, seconds)
    ended, status = os.waitpid(run, os.WNOHANG)
    return status if ended else None


def report_signal(number: int, message: str) -> int:
    """Print which signal ended a run; returns its status in the format of `os.waitpid`."""
    message = message.format(signal_name(number))
    print_after_launcher(message)
    print(message, flush=True)
    return (128 + number) << 8


def exit_with(status: int) -> None:
    """End this process with the status of a child."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
