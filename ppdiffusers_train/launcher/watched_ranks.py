"""Watches the ranks of Paddle's launcher on this host, to report how they ended. Also a program that outlives launcher
and ranks, and imports nothing of this package: `watched_ranks.py LAUNCHER MAILBOX`, with the launcher's process id and
the number of an open socket."""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

ASK_SECONDS = 0.02  # between two checks whether all ranks have been started
LOOK_SECONDS = 2  # between two checks whether the launcher has restarted them
MESSAGE_BYTES = 1 << 16  # at most, of what a rank sends
ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stat(process) -> list:
    """The fields of /proc/PID/stat from the third on (proc(5))."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def address_of(launcher: int) -> str:
    """The address at which the process that watches a launcher receives what its ranks send. It has the launcher's
    start time, because process ids are reused. An address in Linux's abstract namespace leaves no file, however its
    owner ends, and has one owner at a time."""
    return f"\0ppdiffusers_train-{launcher}-{stat(launcher)[19]}"


def open_mailbox(address: str) -> socket.socket:
    """A socket that receives what ranks send; raises an `OSError` if another process has the address."""
    mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mailbox.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        mailbox.bind(address)
    except OSError:
        mailbox.close()
        raise
    return mailbox


class Received:
    """What ranks have sent to a mailbox.

    `message` is the error message of the first rank that failed, or empty; `statuses` are the wait statuses of runs,
    {process id of the supervisor (supervisor.py): status}.
    """

    def __init__(self, mailbox: socket.socket):
        self.mailbox, self.message, self.statuses = mailbox, "", {}
        self._one_at_a_time = threading.Lock()

    def read(self) -> None:
        """Read what has arrived. What other users send is ignored."""
        with self._one_at_a_time, contextlib.suppress(BlockingIOError):
            while True:
                content, details, *_ = self.mailbox.recvmsg(MESSAGE_BYTES, 256, socket.MSG_DONTWAIT)
                process, user, _ = struct.unpack("3i", details[0][2])
                if user == os.getuid():
                    sent = json.loads(content)
                    self.message = self.message or sent.get("message", "")
                    if "status" in sent:
                        self.statuses[process] = sent["status"]


def ranks_of(launcher: int) -> dict:
    """{process id: its environment} of the launcher's ranks that are alive."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        variables = dict(variable.partition("=")[::2] for variable in variables)
        if "PADDLE_TRAINER_ID" in variables:
            found[int(child)] = variables
    return found


def ended_ranks(launcher: int) -> list:
    """The launcher's ranks that have ended, by a look from one that is alive and had time to load this program: the
    launcher starts all of a machine within milliseconds."""
    alive = {int(variables["PADDLE_TRAINER_ID"]): variables for variables in ranks_of(launcher).values()}
    for rank, variables in alive.items():
        first = rank - int(variables.get("PADDLE_LOCAL_RANK", 0))
        return sorted({*range(first, first + int(variables.get("PADDLE_LOCAL_SIZE", 1)))} - {*alive})
    return []


def watch(launcher: int, received: Received) -> list:
    """Wait until the launcher and its ranks have ended; returns [(rank, `exit_status`)] in the order in which the ranks
    ended. Those of a launcher that was killed end after it."""
    poll, ends, watched, is_over = select.poll(), [], {}, False  # {pidfd: (process id, rank)}
    end = os.pidfd_open(launcher)
    poll.register(end, select.POLLIN)
    poll.register(received.mailbox, select.POLLIN)
    while watched or not is_over:
        are_all_there = is_over or _watch_new(launcher, watched, poll) or ends
        ready = {fd for fd, _ in poll.poll(1000 * (LOOK_SECONDS if are_all_there else ASK_SECONDS))}
        received.read()
        gone = []
        for fd in ready & {end, *watched}:
            poll.unregister(fd)
            os.close(fd)
            if fd == end:
                is_over = True
            else:
                process, rank = watched.pop(fd)
                gone.append((rank, exit_status(process, received)))
        ends += sorted(gone, key=lambda it: not was_killed(it[1]))  # a rank that was killed makes the others fail
    return ends


def _watch_new(launcher: int, watched: dict, poll) -> bool:
    """Also watch ranks that have started meanwhile; returns whether all ranks have."""
    expected = 1
    try:
        for process, variables in ranks_of(launcher).items():
            expected = int(variables.get("PADDLE_LOCAL_SIZE", 1))
            if process not in (number for number, _ in watched.values()):
                fd = os.pidfd_open(process)
                watched[fd] = process, int(variables["PADDLE_TRAINER_ID"])
                poll.register(fd, select.POLLIN)
    except (FileNotFoundError, ProcessLookupError):
        pass  # the launcher or the rank has just ended, which `watch` sees next
    return len(watched) >= expected


def exit_status(process: int, received: Received):
    """The wait status of a rank that has ended; None if it is unknown: nothing was sent, and the launcher has already
    reaped the process."""
    if process in received.statuses:
        return received.statuses[process]
    try:
        return int(stat(process)[49])
    except (FileNotFoundError, ProcessLookupError):
        return None


def was_killed(status) -> bool:
    """Whether the process was ended by a signal that does not ask it to stop."""
    return status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) not in ASKED_TO_END


def count_memory_kills() -> int:
    """The number of processes that this machine has killed since its start because it was out of memory."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get("oom_kill", 0))


def final_message(ends: list, message: str, memory_ran_out: bool) -> str:
    """The last message of a run that has ended; empty if there is none.

    Args:
        ends: what `watch` returned.
        message: the error message of the first rank that failed; empty if there is none.
        memory_ran_out: whether the machine has killed a process meanwhile because it was out of memory.
    """
    rank, status = next(((rank, status) for rank, status in ends if status != 0), (None, 0))
    if not was_killed(status):
        return message
    number = os.WTERMSIG(status)
    text = f"rank {rank} was killed by {signal.Signals(number).name} ({number})"
    if number != signal.SIGKILL:
        return text
    if memory_ran_out:
        return f"{text}: the machine ran out of memory, and killed this process or another one"
    if all(was_killed(status) for _, status in ends):
        return (
            f"{text}, as were all on this host, probably by the launcher, which does not wait long for a stop; the run "
            "may still be writing its checkpoint, and its log has its last message"
        )
    return f"{text}; if not by a user, the machine was probably out of memory, which `dmesg` shows"


def wait_for_final_message(launcher: int, received: Received) -> tuple:
    """Wait for the end of a launcher and its ranks; returns (the run's last message, what `watch` returned)."""
    kills = count_memory_kills()
    ends = watch(launcher, received)
    return final_message(ends, received.message, count_memory_kills() > kills), ends


if __name__ == "__main__":
    for number in ASKED_TO_END:  # which may reach all processes of a job; this one ends with the launcher
        signal.signal(number, signal.SIG_IGN)
    text, _ = wait_for_final_message(int(sys.argv[1]), Received(socket.socket(fileno=int(sys.argv[2]))))
    if text:
        print(f"\n{text}", flush=True)  # the line before may have no end, if the launcher was killed
