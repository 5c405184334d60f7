"""Settings that must be made before Paddle is imported. This file does not import Paddle."""

import os
import sys
import warnings
from functools import cache

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")  # variables that a user may have set


@cache
def cpu_vendor() -> str:
    """`"AuthenticAMD"`, `"GenuineIntel"`, … as the kernel reports it; empty if it does not."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity mask, divided among the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))


def configured_threads() -> int:
    """Number of threads for CPU libraries: that of `prepare_cpu`, or what the user has set."""
    # OMP_NUM_THREADS comes second: once Paddle is imported, it is set to 1 unless the user has set it.
    return int(os.environ.get("MKL_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or usable_cores())


def prepare_cpu() -> None:
    """Set threads and libraries for Paddle on a CPU; does nothing when Paddle is already imported.

    * By default, Paddle uses one thread for matrix products and convolutions. `MKL_NUM_THREADS` sets another number;
      `OMP_NUM_THREADS` would, too, but makes Paddle print a warning at every start.
    * Its MKL takes a slow path on AMD processors unless `MKL_DEBUG_CPU_TYPE` selects AVX2.
    * Paddle logs each kind of executor that it starts; `GLOG_minloglevel` keeps only warnings and errors.
    * libpaddle 2.6.2 exports zlib's symbols: an extension module that unpacks strings after it dies with `zlib.error`,
      unless Python's own zlib was loaded first.
    """
    import zlib  # noqa: F401  (loaded before libpaddle on purpose)

    if "paddle" in sys.modules:
        return
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("MKL_NUM_THREADS", str(usable_cores()))
    if cpu_vendor() == "AuthenticAMD":
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    os.environ.setdefault("GLOG_minloglevel", "1")
    # Warnings that do not matter for training: Paddle finds no compiler cache, setuptools replaces distutils.
    for noise in ("No ccache found", "Setuptools is replacing distutils"):
        warnings.filterwarnings("ignore", message=noise)
