"""Signals that ask a run to stop: SIGTERM, Ctrl-C, and, where it is asked for, a scheduler's warning.

In the loop, the first one stops the run after its step, with a checkpoint; another SIGTERM or SIGINT, some seconds
later, ends it at once. Before and after the loop the first one does.
"""

import ctypes
import os
import signal
import sys
import time

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of which --stop_signal chooses one

# Whoever stops a run may signal it more than once: a terminal signals all of its processes, SLURM all of a job's, and
# Paddle's launcher then each of its ranks, one after the other, three times in 0.6 s.
REPETITION_SECONDS = 2.0
LAUNCHER_SECONDS = 0.6

ASKS, REPEATS, INSISTS = "asks", "repeats", "insists"

_entered = []  # contexts of this process


class Patience:
    """Tells a signal that repeats another from one that insists on it.

    A warning announces signals that come anyway. So it never insists, and the first of those is not taken for insisting
    on the warning.
    """

    def __init__(self):
        others = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)) - 1
        self.seconds = REPETITION_SECONDS + LAUNCHER_SECONDS * others
        self._first = {}

    def hear(self, number: int) -> str:
        """`ASKS` for the first signal of its kind, then `REPEATS`, and `INSISTS` once some seconds have passed."""
        kind, now = "stop" if number in STOP_SIGNALS else number, time.monotonic()
        if kind not in self._first:
            self._first[kind] = now
            return ASKS
        return INSISTS if kind == "stop" and now - self._first[kind] > self.seconds else REPEATS


class StopRequest:
    """A context in which signals only set `received`; the loop asks for it between steps. What insists ends the
    process as it would have outside.

    Args:
        also: name of another signal that asks, such as "USR1".
    """

    def __init__(self, also=None):
        self.numbers = STOP_SIGNALS + ((signal.Signals[f"SIG{also}"],) if also else ())
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
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
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
        """What the first signal does beside setting `received`."""
        signal_at_parents_end(0)


class EndAtOnce(StopRequest):
    """A context in which a signal that would have killed the process ends it in order: with a line, and the status
    128 + its number. Handlers that somebody has set are left alone."""

    def __init__(self):
        super().__init__()
        usual = (signal.SIG_DFL, signal.default_int_handler)
        self.numbers = [number for number in STOP_SIGNALS + WARNINGS if signal.getsignal(number) in usual]

    def restore(self) -> None:
        if self.received is None:  # else what `react` has set stays
            super().restore()

    def react(self) -> None:
        # A repetition would kill the process while it ends: Python takes its own handlers away then.
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)
        print(f"{os.path.basename(sys.argv[0])}: ended by {self.received.name}", file=sys.stderr, flush=True)
        raise SystemExit(128 + self.received)


def leave_to_parent() -> None:
    """In a forked child, such as a worker that its parent ends by SIGTERM: nobody waits for a step there."""
    while _entered:
        _entered.pop().restore()


os.register_at_fork(after_in_child=leave_to_parent)


def signal_at_parents_end(number: int) -> None:
    """Have the system send this process a signal when its parent ends, or none (0). On Linux alone."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
