"""Signals that stop a run: SIGTERM, Ctrl-C, and, with --stop_signal, a scheduler's warning.

In the loop, the first signal stops the run after its step, with a checkpoint; another SIGTERM or SIGINT, some seconds
later, ends it at once. Before and after the loop, the first signal ends it at once.
"""

import ctypes
import os
import signal
import sys
import time

from ppdiffusers_train.launcher.last_word import print_after_launcher

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAUNCHER_ENDED = signal.SIGHUP  # what the end of the launcher is to its ranks (stand_in.py)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of which --stop_signal chooses one

# One stop may arrive as several signals: a terminal signals all of its processes, SLURM all of a job's, and Paddle's
# launcher then each of its ranks, one after the other, three times in 0.6 s.
REPETITION_SECONDS = 2.0
LAUNCHER_SECONDS = 0.6

ASKS, REPEATS, INSISTS = "asks", "repeats", "insists"

_entered = []  # active contexts of this process
_launchers_signals = []  # of the stand-in, if this process has one


def end_with_launcher() -> None:
    """From now on, `LAUNCHER_ENDED` stops this process, too. Until `EndAtOnce` listens, signals end it without an
    exception, which would become a traceback, of an import for example; the stand-in has the line."""
    _launchers_signals[:] = [LAUNCHER_ENDED]
    for number in (signal.SIGINT, LAUNCHER_ENDED):  # the latter is ignored after `nohup`
        signal.signal(number, signal.SIG_DFL)


class Patience:
    """Distinguishes a repeated signal of one stop from a second stop.

    A scheduler's warning is followed by other signals anyway. So a warning never insists, and the first stop signal
    after a warning does not insist either. A launcher that ends does not insist, because it has signalled before.
    """

    def __init__(self):
        others = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)) - 1
        self.seconds = REPETITION_SECONDS + LAUNCHER_SECONDS * others
        self._first = {}

    def hear(self, number: int) -> str:
        """`ASKS` for the first signal of a kind, then `REPEATS`, and `INSISTS` after some seconds."""
        kind, now = number if number in WARNINGS else "stop", time.monotonic()
        if kind not in self._first:
            self._first[kind] = now
            return ASKS
        return INSISTS if number in STOP_SIGNALS and now - self._first[kind] > self.seconds else REPEATS


class StopRequest:
    """A context in which a signal only sets `received`, which the loop checks between steps. A signal that insists ends
    the process as outside of the context.

    Args:
        also: name of another signal that stops the run, such as "USR1".
    """

    def __init__(self, also=None):
        self.numbers = [*STOP_SIGNALS, *_launchers_signals, *([signal.Signals[f"SIG{also}"]] if also else [])]
        self.received = None
        self._patience, self._previous = Patience(), {}

    def __enter__(self):
        for number in self.numbers:
            self._previous[number] = signal.signal(number, self._receive)
        _entered.append(self)
        return self

    def __exit__(self, *_):
        _entered.remove(self)
        self.restore()

    def restore(self) -> None:
        """Restore the previous handlers, except of signals that are ignored by now, as in a process that is ending."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def _receive(self, number, frame):
        heard = self._patience.hear(number)
        if self.received is None:
            self.received = signal.Signals(number)
            self.react()
        elif heard == INSISTS:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)

    def react(self) -> None:
        """Called at the first signal, after `received` is set."""
        signal_at_parents_end(0)


class EndAtOnce(StopRequest):
    """A context in which a signal that would kill the process ends it with one line and the exit status 128 + its
    number. Existing handlers are left alone."""

    def __init__(self):
        super().__init__()
        usual = (signal.SIG_DFL, signal.default_int_handler)
        self.numbers = [number for number in (*self.numbers, *WARNINGS) if signal.getsignal(number) in usual]

    def react(self) -> None:
        # Python removes its handlers while it exits, so a repeated signal would kill the process then.
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)
        message = f"{os.path.basename(sys.argv[0])}: ended by {name_of(self.received)}"
        print_after_launcher(message)
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(128 + self.received)


def name_of(number: int) -> str:
    """The name of a signal in messages."""
    return "the end of the launcher" if number == LAUNCHER_ENDED else signal.Signals(number).name


def leave_to_parent() -> None:
    """In a forked child, restore the handlers: a worker that its parent ends by SIGTERM must end."""
    while _entered:
        _entered.pop().restore()


os.register_at_fork(after_in_child=leave_to_parent)


def signal_at_parents_end(number: int) -> None:
    """Make the system send this process a signal when its parent ends, or none (0). Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
