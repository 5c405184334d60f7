"""Returning free memory of the process to the system."""

import ctypes
import sys


def return_free_memory() -> None:
    """Return free memory to the system; the C library of Linux would keep it for later allocations.

    Without this, copies made while models are loaded, and models that are no longer needed, keep their memory.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
