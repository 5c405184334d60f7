"""How far a long piece of work is: one line that is updated in a terminal, lines from time to time in a log file."""

import contextlib
import sys
import time

from tqdm import tqdm

LINES = 100  # of a piece of work, where there is no terminal
MOST_SECONDS = 60  # between two lines, unless one unit of the work takes longer
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}, {remaining} left{postfix}]"


def print_line(text: str) -> None:
    """Print a line to standard output, above the status line if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


class StatusLine:
    """The status line of a piece of work, on standard error.

    Args:
        work, unit: what is done, and what is counted.
        total, done: number of units of the work, and how many of them have been done before.
        visible: whether this process shows it.
    """

    def __init__(self, work: str, unit: str, total: int, done: int = 0, visible: bool = True):
        self.work, self.unit, self.total, self.first, self.done = work, unit, total, done, done
        in_terminal = sys.stderr.isatty()
        self.prints_lines = visible and not in_terminal
        self.bar = tqdm(
            desc=work, unit=unit, total=total, initial=done, bar_format=BAR, disable=not (visible and in_terminal),
            dynamic_ncols=True,
        )  # fmt: skip
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
        is_due = before == self.first or self.done == self.total or before // every < self.done // every
        is_due |= time.monotonic() - self.printed > MOST_SECONDS
        if self.prints_lines and count > 0 and is_due:
            left = self.seconds / (self.done - self.first) * (self.total - self.done)
            parts = f"{self.done}/{self.total} {self.unit}", f"{tqdm.format_interval(left)} left", figures
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
