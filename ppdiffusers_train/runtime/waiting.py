"""Waiting for other ranks through counters in Paddle's store, and telling one that works long from one that hangs.

No collective, so no timeout on work: each process gives a sign of life as long as it works, and who waits gives up only
when one that it waits for has given none for a while.
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

from ppdiffusers_train.runtime.processes import is_alive, this_machine
from ppdiffusers_train.signals import STOP_SIGNALS, WARNINGS

BEAT_SECONDS = 0.5  # between two looks at what this process has done
# As a share of the time between them. A process that hangs uses less: threads that look at a clock; on rank 0 the
# store's, which answers all others, 30 µs a question.
WORKING_CPU = 0.02
WORKING_BYTES = 4096  # a second, read or written; less is what a thread reads of /proc
ASK_SECONDS = (0.0005, 1.0)  # the least and most between two questions; as steps end in milliseconds, fills in hours
PROCESS_BITS = 23  # Linux numbers processes below 2**22
FAILED = 1 << 40  # what a rank adds that will never come


@functools.cache
def store_thread() -> ThreadPoolExecutor:
    """The one thread of this process that talks to Paddle's store, which takes a call that a signal interrupts for a
    broken connection: none reaches this thread."""
    return ThreadPoolExecutor(1, "store", signal.pthread_sigmask, (signal.SIG_BLOCK, STOP_SIGNALS + WARNINGS))


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
    """Have the connections of this process send what is written to them without waiting for more (TCP_NODELAY).

    Paddle's store writes a question in parts, of which the second waits until the first has been acknowledged: 44 ms
    for each question instead of 0.03, on one machine.
    """
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def ask_store(name: str, more: int):
    """Add `more` to a number that all ranks see; the number comes as a future."""
    return store_thread().submit(open_store().add, name, more)


def add(name: str, more: int) -> int:
    """Add `more` to a number that all ranks see, and return it.

    Raises:
        ConnectionError: rank 0, which keeps the numbers, has ended.
    """
    try:
        return ask_store(name, more).result()
    except (RuntimeError, ValueError) as error:  # Paddle's errors, of sockets
        raise ConnectionError(str(error)) from error


def sign_of(rank: int) -> str:
    """The name of the number that a rank raises as long as it works."""
    return f"alive {rank}"


class Work:
    """What this process does: CPU time, of all its threads, and bytes read and written.

    Loading, encoding, writing, drawing and uploading all do one or the other. A process that waits for a lock, a dead
    network disk or a device, or that was stopped, does neither. What it cannot tell is one that turns in a circle.
    """

    def __init__(self):
        self._seen = self._measured()

    def goes_on(self) -> bool:
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
    """From now on, the other ranks of this machine see whether this process exists, and a thread tells all of them
    whenever it works."""
    add(f"process {rank}", this_machine() << PROCESS_BITS | os.getpid())
    threading.Thread(target=_tell, args=(rank,), daemon=True).start()


def _tell(rank: int) -> None:
    work, told = Work(), None
    with contextlib.suppress(RuntimeError):  # the process ends
        while True:
            time.sleep(BEAT_SECONDS)
            if work.goes_on() and (told is None or told.done()):
                told = ask_store(sign_of(rank), 1)  # nobody waits for the answer, which may not come


@dataclass
class Absent:
    """Ranks that have not come yet to where this one waits."""

    signs: dict = field(default_factory=dict)  # {rank: when it last gave a sign of life}
    answered: float = field(default_factory=time.monotonic)  # when the store last did

    @property
    def since(self) -> float:
        """When the one that has been silent for longest gave its last sign."""
        return min(list(self.signs.values()), default=self.answered)

    def silent(self, seconds: float) -> list:
        """Those that have given no sign of life for so long; rank 0 where the store that it keeps does not answer."""
        now = time.monotonic()
        if now - self.answered > seconds / 2:
            return [0]
        return [rank for rank, told in list(self.signs.items()) if now - told >= seconds]


def has_ended(rank: int) -> bool:
    """Whether a rank is known to have ended: those on the same machine can see that."""
    machine, process = divmod(add(f"process {rank}", 0), 1 << PROCESS_BITS)
    return machine != 0 and machine == this_machine() and not is_alive(process)


class Failure(Exception):
    """A rank that others wait for will not come; the message says which, and why."""


class Meetings:
    """Points that all ranks come to, in the same order.

    Args:
        rank, world_size: of this process, and how many there are. All make their `Meetings` in the same order, too.
        timeout: seconds without a sign of life after which the caller gives a rank up.
    """

    _made = itertools.count()

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.world_size, self.held = rank, world_size, 0
        self.look_seconds = min(10.0, timeout / 8)  # between two looks at the absent ranks' signs of life
        self._name = f"meeting {next(self._made)}"

    def come(self) -> None:
        """Tell the others that this rank has come to its next point."""
        self.held += 1
        self._tell(1)

    def fail(self) -> None:
        """Tell the others that this rank will never come."""
        self._tell(FAILED)

    def _tell(self, more: int) -> None:
        add(f"{self._name} {self.rank}", more)
        add(f"{self._name} all", more)

    def _told(self, rank) -> int:
        return add(f"{self._name} {rank}", 0)

    def wait(self, absent: Absent) -> None:
        """Return when all have come to where this rank is; meanwhile keep in `absent` who has not.

        Raises:
            Failure: a rank has failed, or ended.
            ConnectionError: rank 0 has ended.
        """
        began, looked, seen = absent.answered, absent.answered, {}
        absent.signs.update(dict.fromkeys(range(self.world_size), began))
        while (told := self._told("all")) < self.held * self.world_size:
            absent.answered = now = time.monotonic()
            if now - looked > self.look_seconds:
                self._look(absent, seen)
                looked = now
            # A wait is at most a twentieth longer than the work that it is for.
            time.sleep(min(max(ASK_SECONDS[0], (now - began) / 20), ASK_SECONDS[1], self.look_seconds))
        if told >= FAILED:
            raise Failure(f"rank {next(r for r in range(self.world_size) if self._told(r) >= FAILED)} failed")

    def _look(self, absent: Absent, seen: dict) -> None:
        """Who has come, and of the others, who works: their `seen` number has changed since the last look."""
        for rank in list(absent.signs):
            if self._told(rank) >= self.held:
                del absent.signs[rank]
                continue
            if has_ended(rank):
                raise Failure(f"rank {rank} has ended")
            sign = add(sign_of(rank), 0)
            if seen.setdefault(rank, sign) != sign:
                seen[rank], absent.signs[rank] = sign, time.monotonic()
