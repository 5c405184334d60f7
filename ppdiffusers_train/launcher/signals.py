"""Signals that stop a run: SIGTERM, Ctrl-C, the end of its terminal, and, with --stop_signal, a scheduler's warning.

In the loop, the first signal stops the run after its step, with a checkpoint; another SIGTERM or SIGINT, some seconds
later, ends it at once. Before and after the loop, the first signal ends it at once.
"""

import ctypes
import os
import signal
import sys
import time

from ppdiffusers_train.launcher.final_message import print_after_launcher

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAUNCHER_ENDED = signal.SIGHUP  # sent to ranks when their launcher has ended (supervisor.py)
WARNING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # of which --stop_signal chooses one

# One stop may arrive as several signals: a terminal signals all of its processes, SLURM all of a job's, and Paddle's
# launcher then each of its ranks, one after the other, three times in 0.6 s.
REPETITION_SECONDS = 2.0
LAUNCHER_SECONDS = 0.6

# What a signal is: the first of its kind, the same stop again, or a second stop.
FIRST, REPEATED, SECOND = "first", "repeated", "second"

_entered = []  # active contexts of this process
_supervisor_signals = []  # further signals that stop this process, if it has a supervisor


def end_with_launcher() -> None:
    """From now on, `LAUNCHER_ENDED` stops this process, too.

    Until there is an `ExitOnSignal`, signals end the process without an exception, which would become a traceback, of
    an import for example; the supervisor prints the line.
    """
    _supervisor_signals[:] = [LAUNCHER_ENDED]
    for number in (signal.SIGINT, LAUNCHER_ENDED):  # the latter is ignored after `nohup`
        signal.signal(number, signal.SIG_DFL)


class SignalClassifier:
    """Distinguishes the repeated signals of one stop from a second stop.

    A scheduler's warning is followed by other signals anyway. So a warning is never a second stop, nor is the first
    stop signal after a warning. Nor is the end of the launcher, which has signalled before.
    """

    def __init__(self):
        others = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)) - 1
        self.seconds = REPETITION_SECONDS + LAUNCHER_SECONDS * others
        self._first = {}

    def classify(self, number: int) -> str:
        """`FIRST` for the first signal of a kind, then `REPEATED`, and after some seconds `SECOND`."""
        kind, now = number if number in WARNING_SIGNALS else "stop", time.monotonic()
        if kind not in self._first:
            self._first[kind] = now
            return FIRST
        return SECOND if number in STOP_SIGNALS and now - self._first[kind] > self.seconds else REPEATED


class StopRequest:
    """A context in which a signal only sets `received`, which the loop checks between steps. A second stop ends the
    process as outside of the context.

    Args:
        also: name of another signal that stops the run, such as "USR1".
    """

    def __init__(self, also=None):
        self.numbers = [*STOP_SIGNALS, *_supervisor_signals, *([signal.Signals[f"SIG{also}"]] if also else [])]
        is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as after `nohup`
        if not is_ignored and signal.SIGHUP not in self.numbers:
            self.numbers.append(signal.SIGHUP)
        self.received = None
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self._classifier, self._previous = SignalClassifier(), {}

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
        kind = self._classifier.classify(number)
        if self.received is None:
            self.received = signal.Signals(number)
            if number == signal.SIGHUP:
                self._leave_terminals()
            self.on_first_signal()
        elif kind == SECOND:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)

    def _leave_terminals(self) -> None:
        """Write to nowhere what was written to terminals: one that has been closed answers with errors."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)

    def on_first_signal(self) -> None:
        """Called at the first signal, after `received` is set."""
        signal_at_parents_end(0)


class ExitOnSignal(StopRequest):
    """A context in which a signal that would kill the process ends it with one line and the exit status 128 + its
    number. Existing handlers are left alone."""

    def __init__(self):
        super().__init__()
        usual = (signal.SIG_DFL, signal.default_int_handler)
        self.numbers = [number for number in (*self.numbers, *WARNING_SIGNALS) if signal.getsignal(number) in usual]

    def on_first_signal(self) -> None:
        # Python removes its handlers while it exits, so a repeated signal would kill the process then.
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)
        message = f"{os.path.basename(sys.argv[0])}: ended by {signal_name(self.received)}"
        print_after_launcher(message)
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(128 + self.received)


def signal_name(number: int) -> str:
    """The name of a signal in messages."""
    return "the end of the launcher" if number in _supervisor_signals else signal.Signals(number).name


def restore_handlers() -> None:
    """In a forked child, restore the handlers: a worker that its parent ends by SIGTERM must end."""
    while _entered:
        _entered.pop().restore()


os.register_at_fork(after_in_child=restore_handlers)


def signal_at_parents_end(number: int) -> None:
    """Make the system send this process a signal when its parent ends, or none (0). Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
