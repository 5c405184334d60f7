"""How the sides of `speed.py` take turns: each is a process that trains as many steps as asked for, then waits.

Requests come on standard input, one number of steps per line; answers go to standard output, in
lines of JSON that begin with a mark, because libraries print, too.
"""

import json
import os
import resource
import subprocess
import sys
import time

MARK = "@@ "


def answer(**values) -> None:
    """Send values to the process that asked."""
    print(MARK + json.dumps(values), flush=True)


def peak_mb() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Gate:
    """In a side's process: `wait()` before the first step, `after_step()` after each. It ends the process."""

    def __init__(self):
        self.asked = self.left = 0

    def wait(self) -> None:
        self.asked = self.left = int(sys.stdin.readline() or 0)
        self.started = time.perf_counter()
        if not self.asked:
            sys.stdout.flush()
            os._exit(0)

    def after_step(self) -> None:
        self.left -= 1
        if not self.left:
            answer(seconds=(time.perf_counter() - self.started) / self.asked, peak_mb=peak_mb())
            self.wait()


class Side:
    """In the process that asks: one side, and what it answered."""

    def __init__(self, command: list, environment: dict):
        self.seconds, self.peak_mb, self.command = [], 0.0, command
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, steps: int) -> dict:
        """Have it take so many steps; what it answers."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.listen()

    def listen(self) -> dict:
        """The next answer.

        Raises:
            RuntimeError: it ended without one.
        """
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise RuntimeError(f"no answer; to see why: {' '.join(map(str, self.command))}")

    def measure(self, steps: int) -> None:
        """Add one measurement."""
        figures = self.ask(steps)
        self.seconds.append(figures["seconds"])
        self.peak_mb = figures["peak_mb"]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()
