"""How far a long piece of work is: one line that is updated in a terminal, lines from time to time in a log file."""

import contextlib
import os
import sys
import time

from tqdm import tqdm

from ppdiffusers_train.errors import log_errors_ignored, one_line

# Where there is no terminal:
LINES = 100  # of a piece of work
LEAST_SECONDS, MOST_SECONDS = 5, 60  # between two lines, unless one unit of the work takes longer
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}, {remaining} left{postfix}]"


def counted(count: int, word: str) -> str:
    """A count with its noun: `1 sample`, `7 samples`."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def print_line(text: str) -> None:
    """Print a line to standard output, above the status line if there is one.

    If the disk with the log file is full, the line is lost, and not the run.
    """
    with log_errors_ignored():
        tqdm.write(one_line(text))
        sys.stdout.flush()


def print_on_main(text: str) -> None:
    """Print a line on rank 0 alone, also before the ranks have met."""
    if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        print_line(text)


class StatusLine:
    """The status line of a piece of work, on standard error.

    Args:
        work, unit: what is done, and what is counted.
        total, done: number of units of the work, and how many of them have been done before.
        visible: whether this process shows it.
        least_seconds: between two lines of a log file, the last line aside.
    """

    def __init__(
        self,
        work: str,
        unit: str,
        total: int,
        done: int = 0,
        visible: bool = True,
        least_seconds: float = LEAST_SECONDS,
    ):
        self.work, self.unit, self.total, self.first, self.done = work, unit, total, done, done
        # A terminal of unknown width would show an empty line.
        in_terminal = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self.prints_lines = visible and not in_terminal
        self.bar = tqdm(
            desc=work, unit=unit, total=total, initial=done, bar_format=BAR, disable=not (visible and in_terminal),
            dynamic_ncols=True,
        )  # fmt: skip
        self.least_seconds = least_seconds
        self.started = self.printed = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Leave the line as it is, below all that was printed so far."""
        self.bar.close()

    @property
    def seconds(self) -> float:
        """Seconds of work so far."""
        return max(time.monotonic() - self.started, 1e-9)

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Advance by `count` units, and show `figures` at the end of the line."""
        before, self.done = self.done, self.done + count
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update(count)
        every = max(1, self.total // LINES)
        seconds = time.monotonic() - self.printed
        is_due = before == self.first or before // every < self.done // every or seconds > MOST_SECONDS
        is_due = self.done == self.total or (is_due and seconds >= self.least_seconds)
        if self.prints_lines and count > 0 and is_due:
            left = self.seconds / (self.done - self.first) * (self.total - self.done)
            parts = f"{self.done}/{self.total} {self.unit}", f"{tqdm.format_interval(left)} left", figures
            with log_errors_ignored():
                print(f"{self.work}: {', '.join(filter(None, parts))}", file=sys.stderr, flush=True)
            self.printed = time.monotonic()

    @contextlib.contextmanager
    def paused(self):
        """A context whose time does not count as work."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - began
