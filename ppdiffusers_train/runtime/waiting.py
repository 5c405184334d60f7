"""Waiting for other ranks through counters in Paddle's store, and distinguishing a rank that works from one that hangs.

It uses no collective, so work has no timeout: each process gives signs of life as long as it works, and a rank stops
waiting only when a missing one has given none for a while.
"""

import contextlib
import functools
import itertools
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from paddle.base import core

from ppdiffusers_train.launcher.signals import STOP_SIGNALS, WARNING_SIGNALS
from ppdiffusers_train.runtime.processes import is_alive, this_machine

BEAT_SECONDS = 0.5  # between two measurements of the work of this process
# Least CPU time of a process that works, as a fraction of the time between measurements. A process that hangs uses
# less: for threads that poll; on rank 0 for the store, which answers the others in 30 µs per request.
WORKING_CPU = 0.02
WORKING_BYTES = 4096  # read or written per second by a process that works; more than a thread reads from /proc
ASK_SECONDS = (
    0.0005,
    1.0,
)  # least and most between two requests: a step takes milliseconds, filling a cache may take hours
PROCESS_BITS = 23  # process ids of Linux are below 2**22
FAILED = 1 << 40  # added to the counters by a rank that has failed


@functools.cache
def store_thread() -> ThreadPoolExecutor:
    """The only thread of this process that talks to Paddle's store. It blocks signals, because the store mistakes an
    interrupted call for a broken connection."""
    return ThreadPoolExecutor(1, "store", signal.pthread_sigmask, (signal.SIG_BLOCK, STOP_SIGNALS + WARNING_SIGNALS))


@functools.cache
def open_store():
    """A connection of our own to the store that the ranks of a run have met at.

    Paddle's own is used by the main thread, where a collective begins for the first time and ranks exchange addresses.
    Two threads on one connection take each other's answers.
    """
    core.create_or_get_global_tcp_store()  # on rank 0, begins to serve
    endpoint = os.environ.get("PADDLE_MASTER") or os.environ["PADDLE_TRAINER_ENDPOINTS"].partition(",")[0]
    host, _, port = endpoint.rpartition(":")
    nobody_to_wait_for = 0
    store = core.TCPStore(host, int(port), False, nobody_to_wait_for)
    send_at_once()
    return store


def send_at_once() -> None:
    """Set TCP_NODELAY on the connections of this process, which then send what is written to them at once.

    Paddle's store writes a request in parts, and the second would wait until the first is acknowledged: 44 ms per
    request instead of 0.03 ms on one machine.
    """
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def ask_store(name: str, more: int):
    """Add `more` to a counter of all ranks; returns a future of its new value."""
    return store_thread().submit(open_store().add, name, more)


def add(name: str, more: int) -> int:
    """Add `more` to a counter of all ranks, and return its new value.

    Raises:
        ConnectionError: rank 0, which holds the counters, has ended.
    """
    try:
        return ask_store(name, more).result()
    except (RuntimeError, ValueError) as error:  # Paddle's errors, of sockets
        raise ConnectionError(str(error)) from error


def sign_of(rank: int) -> str:
    """The name of the counter that a rank increments as long as it works."""
    return f"alive {rank}"


class Work:
    """The work of this process: CPU time of all its threads, and bytes read and written.

    Loading, encoding, writing, generating and uploading use one or the other. A process that waits for a lock, a dead
    network disk or a device, or that was stopped, uses neither. An endless loop cannot be distinguished from work.
    """

    def __init__(self):
        self._seen = self._measured()

    def has_worked(self) -> bool:
        """Whether the process has worked since the last call."""
        before, self._seen = self._seen, self._measured()
        seconds, cpu, moved = (now - then for now, then in zip(self._seen, before))
        return cpu > WORKING_CPU * seconds or moved > WORKING_BYTES * seconds

    @staticmethod
    def _measured() -> tuple:
        moved = 0
        with contextlib.suppress(OSError):  # not Linux, or not allowed
            moved = sum(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines())
        return time.monotonic(), time.process_time(), moved


@functools.cache
def start_signs_of_life(rank: int) -> None:
    """From now on, ranks on this machine can see whether this process exists, and a thread signals to all ranks when it
    has worked."""
    add(f"process {rank}", this_machine() << PROCESS_BITS | os.getpid())
    threading.Thread(target=_signal_work, args=(rank,), daemon=True).start()


def _signal_work(rank: int) -> None:
    work, sent = Work(), None
    with contextlib.suppress(RuntimeError):  # the process ends
        while True:
            time.sleep(BEAT_SECONDS)
            if work.has_worked() and (sent is None or sent.done()):
                sent = ask_store(sign_of(rank), 1)  # without waiting for the answer, which may not come


@dataclass
class Absent:
    """Ranks that have not arrived yet at the point where this one waits."""

    signs: dict = field(default_factory=dict)  # {rank: when it last gave a sign of life}
    answered: float = field(default_factory=time.monotonic)  # when the store last answered

    @property
    def since(self) -> float:
        """The oldest of the last signs of life."""
        return min(list(self.signs.values()), default=self.answered)

    def silent(self, seconds: float) -> list:
        """The ranks without a sign of life for so long; rank 0 if its store does not answer."""
        now = time.monotonic()
        if now - self.answered > seconds / 2:
            return [0]
        return [rank for rank, last in list(self.signs.items()) if now - last >= seconds]


def has_ended(rank: int) -> bool:
    """Whether a rank is known to have ended, which can be seen only on the same machine."""
    machine, process = divmod(add(f"process {rank}", 0), 1 << PROCESS_BITS)
    return machine != 0 and machine == this_machine() and not is_alive(process)


class Failure(Exception):
    """A rank that others wait for will not arrive; the message says which rank and why."""


class Meetings:
    """Barriers that all ranks pass in the same order.

    Args:
        rank, world_size: of this process. All ranks have to create their `Meetings` in the same order, too.
        timeout: seconds without a sign of life after which the caller stops waiting for a rank.
    """

    _made = itertools.count()

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.world_size, self.held = rank, world_size, 0
        self.look_seconds = min(10.0, timeout / 8)  # between two checks of the absent ranks' signs of life
        self._name = f"meeting {next(self._made)}"

    def come(self) -> None:
        """Signal to the others that this rank has reached its next barrier."""
        self.held += 1
        self._add(1)

    def fail(self) -> None:
        """Signal to the others that this rank has failed."""
        self._add(FAILED)

    def _add(self, more: int) -> None:
        add(f"{self._name} {self.rank}", more)
        add(f"{self._name} all", more)

    def _arrivals(self, rank) -> int:
        return add(f"{self._name} {rank}", 0)

    def wait(self, absent: Absent) -> None:
        """Wait until all ranks have reached this barrier; meanwhile keep the missing ones in `absent`.

        Raises:
            Failure: a rank has failed, or ended.
            ConnectionError: rank 0 has ended.
        """
        began, looked, seen = absent.answered, absent.answered, {}
        absent.signs.update(dict.fromkeys(range(self.world_size), began))
        while (arrivals := self._arrivals("all")) < self.held * self.world_size:
            absent.answered = now = time.monotonic()
            if now - looked > self.look_seconds:
                self._look(absent, seen)
                looked = now
            # Polling makes a wait at most a twentieth longer.
            time.sleep(min(max(ASK_SECONDS[0], (now - began) / 20), ASK_SECONDS[1], self.look_seconds))
        if arrivals >= FAILED:
            raise Failure(f"rank {next(r for r in range(self.world_size) if self._arrivals(r) >= FAILED)} failed")

    def _look(self, absent: Absent, seen: dict) -> None:
        """Update `absent`: which ranks have arrived, and which of the others have worked since the last check."""
        for rank in list(absent.signs):
            if self._arrivals(rank) >= self.held:
                del absent.signs[rank]
                continue
            if has_ended(rank):
                raise Failure(f"rank {rank} has ended")
            sign = add(sign_of(rank), 0)
            if seen.setdefault(rank, sign) != sign:
                seen[rank], absent.signs[rank] = sign, time.monotonic()
