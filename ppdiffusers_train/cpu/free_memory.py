"""Memory of the process that nobody holds any more."""

import ctypes
import sys


def return_free_memory() -> None:
    """Give memory that is free back to the system, which the C library of Linux would keep for what may come.

    Without this, the copies made while a model is read, and models that are no longer needed, count until the end.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
