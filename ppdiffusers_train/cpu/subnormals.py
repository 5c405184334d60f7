"""Subnormal numbers, with which CPUs compute slowly."""

import ctypes
import platform
import sys

import numpy as np


def flush_subnormals(flush: bool) -> None:
    """Make this thread, and those that compute for it, treat numbers below 1.2e-38 as zero; or stop that.

    Gradients through saturated attention have many of them, and a CPU computes with each in microcode: a step of the
    prior took twice as long after 18 steps. They do not matter to updates: AdamW's epsilon is 1e-8.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    for dtype in (np.float16, np.float32, np.float64):
        np.finfo(dtype)  # NumPy computes this once; later it would warn that there are no subnormals
    mathematics = ctypes.CDLL("libm.so.6")
    environment = (ctypes.c_uint32 * 8)()  # glibc's fenv_t; the last word is the register MXCSR
    mathematics.fegetenv(environment)
    to_zero = 0x8000 | 0x0040  # results, and operands (Intel's manual, volume 1, section 10.2.3)
    environment[7] = environment[7] | to_zero if flush else environment[7] & ~to_zero
    mathematics.fesetenv(environment)
