"""One run at a time in a folder, also on network disks that several machines share.

A process that wants a folder puts a file of its own into it, a *claim*, and then looks for those of others. It has the
folder when it sees no other claim; so of two processes, the one that comes later sees the first one's. A claim says
whose it is, and changes at intervals. On its own machine it holds for as long as its process is alive, elsewhere for as
long as it changes. Nothing of a file system is needed but files that are created, read and deleted, and no clocks are
compared.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from ppdiffusers_train.errors import UserError, WriteError, writing
from ppdiffusers_train.launcher.final_message import print_after_launcher
from ppdiffusers_train.runtime.processes import is_alive, started_at, this_machine

PREFIX = ".run-"
BEAT_SECONDS = 2.0  # between two changes of a claim
DEAD_SECONDS = 30.0  # without a change, after which a process of another machine has ended
LOOK_SECONDS = 0.2
QUIET_SECONDS = 1.0  # of waiting, after which that is printed
SIZE = 400  # bytes of a claim, which is overwritten in place
# What a run does: it looks for other claims, trains, or finishes what it does because it was asked to stop.
CLAIMING, AT_WORK, ENDING = "claiming", "at work", "ending"


class FolderLock:
    """A folder that this process has claimed until the end of the context, or its own. `stop` may be set to a
    `StopRequest`, and `is_ending` to whether the run is about to end: a run that resumes then waits for it.

    Args:
        folder: of the run.
        resumes: whether to wait for a run there that has been asked to stop.
        log: called with a line when that takes a while.
    Raises:
        UserError: another run is at work there.
    """

    def __init__(self, folder: Path, resumes: bool, log=print):
        self.folder, self.resumes, self.log = folder, resumes, log
        # Of two that come at the same time, the first by name has the folder, which should be the one that came first.
        self.path = folder / f"{PREFIX}{time.time_ns():020}-{secrets.token_hex(4)}"
        self.stop, self.is_ending, self._is_over, self._beats = None, False, threading.Event(), 0
        try:
            self._create(CLAIMING)
            self._wait_for_others(Others(folder, self.path))
            self._beat(AT_WORK)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._keep, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def release(self) -> None:
        """Give the folder back."""
        self._is_over.set()
        with contextlib.suppress(OSError):  # a claim of a process that has ended holds nobody up
            self.path.unlink(missing_ok=True)

    def _content(self, state: str) -> bytes:
        """The claim in this state, of another content each time."""
        self._beats += 1
        who = {"machine": this_machine(), "process": os.getpid(), "started": started_at(os.getpid())}
        text = json.dumps({**who, "host": socket.gethostname()[:64], "state": state, "beats": self._beats})
        return text.encode().ljust(SIZE)

    def _create(self, state: str) -> None:
        with writing("--output_dir: the run's lock", self.folder):
            temporary = self.path.with_name(f"{self.path.name}.new")
            temporary.write_bytes(self._content(state))
            os.rename(temporary, self.path)  # so that nobody sees half of it

    def _beat(self, state: str) -> None:
        """Change the claim. Raises a `FileNotFoundError` if it is gone; it is not created again here, because another
        run may have taken the folder."""
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            os.write(descriptor, self._content(state))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _wait_for_others(self, others: "Others") -> None:
        """Return once no other process claims the folder."""
        is_logged, start, beaten = False, time.monotonic(), time.monotonic()
        while found := others.look():
            for name, claim in found.items():
                is_first = claim["state"] == CLAIMING and self.path.name < name
                if claim["is_known"] and not is_first and not (claim["state"] == ENDING and self.resumes):
                    raise UserError(
                        f"--output_dir: {str(self.folder)!r}: another run is at work there (process "
                        f"{claim['process']} of {claim['host']}); expected its end, or another folder"
                    )
            is_long = time.monotonic() - start > QUIET_SECONDS
            if is_long and not is_logged and (line := waits_for(found.values())):
                is_logged = True
                self.log(f"{str(self.folder)!r}: {line}")
            if time.monotonic() - beaten > BEAT_SECONDS:
                self._beat(CLAIMING)
                beaten = time.monotonic()
            time.sleep(LOOK_SECONDS)

    def _keep(self) -> None:
        """Change the claim at intervals, and at once when the run is asked to stop."""
        state, beaten = AT_WORK, time.monotonic()
        while not self._is_over.wait(LOOK_SECONDS):
            before, state = state, ENDING if self.is_ending or (self.stop and self.stop.received) else AT_WORK
            if state == before and time.monotonic() - beaten < BEAT_SECONDS:
                continue
            beaten = time.monotonic()
            try:
                self._beat(state)
            except FileNotFoundError:
                self._claim_again(state)
            except OSError:  # a disk that is away for a while
                pass

    def _claim_again(self, state: str) -> None:
        """The claim is gone. If somebody has emptied the folder, it is claimed again; if another run has taken the
        folder, this process ends, before it writes there again."""
        if self._is_over.is_set():
            return
        if Others(self.folder, self.path).names():
            message = f"--output_dir: {str(self.folder)!r}: another run has taken this folder; this one has ended"
            print_after_launcher(message)
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        with contextlib.suppress(WriteError):  # the folder is gone as well, until the run makes it again
            self._create(state)


class Others:
    """The claims of a folder but one."""

    def __init__(self, folder: Path, own: Path):
        self.folder, self.own = folder, own
        self._seen = {}  # {name: (content, since when, whether it has changed meanwhile)}

    def names(self) -> list:
        """Their names."""
        return sorted(path.name for path in self.folder.glob(f"{PREFIX}*") if path != self.own)

    def look(self) -> dict:
        """{name: claim} of the processes that may be alive; claims of others are removed. `claim["is_known"]` is
        whether its process is certainly alive."""
        found = {}
        for name in self.names():
            try:
                content = (self.folder / name).read_bytes()
            except OSError:  # it has just been removed
                continue
            claim, now = read_claim(content), time.monotonic()
            before, since, has_changed = self._seen.get(name, (content, now, False))
            if content != before:
                since, has_changed = now, True
            self._seen[name] = content, since, has_changed
            if is_here := claim["machine"] == this_machine() != 0:
                is_over = not is_alive(claim["process"]) or started_at(claim["process"]) != claim["started"]
            else:
                is_over = now - since > DEAD_SECONDS
            if is_over:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
            else:
                found[name] = {**claim, "is_known": is_here or has_changed}
        return found


def waits_for(claims) -> str:
    """A line about the claims of others that this process waits for; empty where that takes a moment only."""
    for claim in claims:
        if claim["state"] == ENDING:
            return "another run still writes there; waiting for its end"
        if not claim["is_known"]:
            return f"another run was there, on {claim['host']}; it has {DEAD_SECONDS:.0f} s to show that it is at work"
    return ""


def read_claim(content: bytes) -> dict:
    """A claim; of an unknown process if it cannot be read."""
    with contextlib.suppress(ValueError):
        claim = json.loads(content)
        if isinstance(claim, dict) and {"machine", "process", "started", "host", "state"} <= claim.keys():
            return claim
    return {"machine": 0, "process": "?", "started": "", "host": "another machine", "state": AT_WORK}
