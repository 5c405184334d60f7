"""Processes of this machine: an identifier of the machine, and whether a process is alive."""

import functools
import hashlib
import os
from pathlib import Path

from ppdiffusers_train.launcher.watched_ranks import stat


@functools.cache
def this_machine() -> int:
    """A number above 0 that identifies the machine or container of this process; 0 if it is unknown."""
    try:
        words = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return 0
    return 1 + int.from_bytes(hashlib.blake2b(words.encode(), digest_size=4).digest(), "big")


def started_at(process: int) -> str:
    """When a process of this machine was started, in the system's own unit: ids of processes are reused. Empty if it is
    not known."""
    try:
        return stat(process)[19]
    except OSError:
        return ""


def is_alive(process: int) -> bool:
    """Whether a process of this machine is running. A zombie, for which its parent has not waited yet, is not."""
    try:
        return stat(process)[0] not in "ZX"
    except OSError:
        return False
