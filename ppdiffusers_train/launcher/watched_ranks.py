"""Watches the ranks of Paddle's launcher on this host, to report how they ended. Also a program that outlives launcher
and ranks, and imports nothing of this package: `watched_ranks.py LAUNCHER`, with the launcher's process id."""

import os
import select
import signal
import sys
import tempfile
from pathlib import Path

ASK_SECONDS = 0.02  # between two checks whether all ranks have been started
LOOK_SECONDS = 2  # between two checks whether the launcher has restarted them
ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stat(process) -> list:
    """The fields of /proc/PID/stat from the third on (proc(5))."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def message_file(launcher: int) -> Path:
    """The file for the error message of the first rank that fails; its name is the prefix of other files. It has the
    launcher's start time, because process ids are reused."""
    return Path(tempfile.gettempdir(), f"ppdiffusers_train-{launcher}-{stat(launcher)[19]}")


def status_file(launcher: int, process: int) -> Path:
    """The file for the wait status of a run, written by its stand-in (stand_in.py)."""
    return message_file(launcher).with_suffix(f".{process}.status")


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


def watch(launcher: int) -> list:
    """Wait until the launcher has ended; returns [(rank, `exit_status`)] in the order in which its ranks ended."""
    poll, ends, watched = select.poll(), [], {}  # {pidfd: (process id, rank)}
    end = os.pidfd_open(launcher)
    poll.register(end, select.POLLIN)
    while True:
        are_all_there = _watch_new(launcher, watched, poll) or ends
        ready = {fd for fd, _ in poll.poll(1000 * (LOOK_SECONDS if are_all_there else ASK_SECONDS))}
        gone = []
        for fd in ready - {end}:
            process, rank = watched.pop(fd)
            gone.append((rank, exit_status(launcher, process)))
            poll.unregister(fd)
            os.close(fd)
        ends += sorted(gone, key=lambda it: not was_killed(it[1]))  # a rank that was killed makes the others fail
        if end in ready:
            os.close(end)
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


def exit_status(launcher: int, process: int):
    """The wait status of a rank that has ended; None if it is unknown: no file was written, and the launcher has
    already reaped the process."""
    try:
        return int(status_file(launcher, process).read_text())
    except FileNotFoundError:
        pass
    try:
        return int(stat(process)[49])
    except (FileNotFoundError, ProcessLookupError):
        return None


def was_killed(status) -> bool:
    """Whether the process was ended by a signal that does not ask it to stop."""
    return status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) not in ASKED_TO_END


def memory_kills() -> int:
    """The number of processes that this machine has killed since its start because it was out of memory."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get("oom_kill", 0))


def last_word(ends: list, message: str, memory_ran_out: bool) -> str:
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


def wait_for_last_word(launcher: int) -> tuple:
    """Wait for the end of a launcher; returns (the run's last message, what `watch` returned)."""
    file, kills = message_file(launcher), memory_kills()
    ends = watch(launcher)
    message = file.read_text() if file.exists() else ""
    for left in file.parent.glob(f"{file.name}*"):
        left.unlink(missing_ok=True)
    return last_word(ends, message, memory_kills() > kills), ends


if __name__ == "__main__":
    text, _ = wait_for_last_word(int(sys.argv[1]))
    if text:
        print(text, flush=True)
