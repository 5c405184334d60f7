"""How the ranks of Paddle's launcher on this host ended, as seen from outside. Also a program of its own, which
outlives launcher and ranks and imports nothing of this package: `watched_ranks.py LAUNCHER`, a process number."""

import os
import select
import signal
import sys
import tempfile
from pathlib import Path

ASK_SECONDS = 0.02  # between two looks whether all ranks have been started
LOOK_SECONDS = 2  # between two looks whether the launcher has started them anew
ASKED_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stat(process) -> list:
    """The fields of /proc/PID/stat from the third on (proc(5))."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def message_file(launcher: int) -> Path:
    """Where the first rank that fails writes why; others begin with its name. Process numbers come again, with another
    time of start."""
    return Path(tempfile.gettempdir(), f"ppdiffusers_train-{launcher}-{stat(launcher)[19]}")


def status_file(launcher: int, process: int) -> Path:
    """Where a rank that stands in for its run (stand_in.py) writes the run's wait status."""
    return message_file(launcher).with_suffix(f".{process}.status")


def ranks_of(launcher: int) -> dict:
    """{process number: what Paddle's launcher has put into its environment} of its ranks that live."""
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
    """Wait until the launcher has ended; [(rank, `exit_status`)] in the order in which its ranks have."""
    poll, ends, watched = select.poll(), [], {}  # {pidfd: (process number, rank)}
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
        ends += sorted(gone, key=lambda it: not was_killed(it[1]))  # what kills one soon fails the others
        if end in ready:
            os.close(end)
            return ends


def _watch_new(launcher: int, watched: dict, poll) -> bool:
    """Also watch the ranks that have come meanwhile; whether there are as many as there should be."""
    expected = 1
    try:
        for process, variables in ranks_of(launcher).items():
            expected = int(variables.get("PADDLE_LOCAL_SIZE", 1))
            if process not in (number for number, _ in watched.values()):
                fd = os.pidfd_open(process)
                watched[fd] = process, int(variables["PADDLE_TRAINER_ID"])
                poll.register(fd, select.POLLIN)
    except (FileNotFoundError, ProcessLookupError):
        pass  # launcher or rank ends at this moment, which `watch` sees next
    return len(watched) >= expected


def exit_status(launcher: int, process: int):
    """The wait status of a rank that has ended; None where nobody knows: it has not written it, and the launcher has
    asked the kernel first."""
    try:
        return int(status_file(launcher, process).read_text())
    except FileNotFoundError:
        pass
    try:
        return int(stat(process)[49])
    except (FileNotFoundError, ProcessLookupError):
        return None


def was_killed(status) -> bool:
    """Whether a signal ended the process that nobody sends to ask for its end."""
    return status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) not in ASKED_TO_END


def memory_kills() -> int:
    """How many processes this machine has killed for want of memory since it was started."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get("oom_kill", 0))


def last_word(ends: list, message: str, memory_ran_out: bool) -> str:
    """What is to be said of a run that has ended, if anything.

    Args:
        ends: as `watch` returns them.
        message: what the first rank that failed has said; empty where none did.
        memory_ran_out: whether the machine has killed a process for want of memory meanwhile.
    """
    rank, status = next(((rank, status) for rank, status in ends if status != 0), (None, 0))
    if not was_killed(status):
        return message
    number = os.WTERMSIG(status)
    text = f"rank {rank} was killed by {signal.Signals(number).name} ({number})"
    if number != signal.SIGKILL:
        return text
    if memory_ran_out:
        return f"{text}: the machine ran out of memory, and killed it or another process to get some"
    if all(was_killed(status) for _, status in ends):
        return (
            f"{text}, as were all on this host, probably by the launcher, which does not wait long for a stop; the run "
            "then ends by itself, and its log says how"
        )
    return f"{text}; if nobody did that, the machine did for want of memory, and `dmesg` says so"


def wait_for_last_word(launcher: int) -> tuple:
    """Wait for the end of a launcher; returns (the run's last word, what `watch` returns)."""
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
