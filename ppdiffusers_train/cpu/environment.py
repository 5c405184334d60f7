"""What must stand in the process before Paddle is imported. This file imports nothing of Paddle."""

import os
import sys
import warnings
from functools import cache

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")  # what a user may have said about processors


@cache
def cpu_vendor() -> str:
    """`"AuthenticAMD"`, `"GenuineIntel"`, … as the kernel reports it; empty where it does not."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def usable_cores() -> int:
    """Cores this process may run on: the affinity mask where the system has one, shared fairly by local ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("PADDLE_LOCAL_SIZE", 1)))


def configured_threads() -> int:
    """How many threads a processor's library may start: those of `prepare_cpu`, or what the user says."""
    # Once Paddle is imported, OMP's variable is there in any case: it sets it to 1 unless the user has said otherwise.
    return int(os.environ.get("MKL_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or usable_cores())


def prepare_cpu() -> None:
    """Set threads and libraries for Paddle on a CPU; does nothing when Paddle is already imported.

    * Paddle starts one thread for matrix products and convolutions unless told otherwise. `MKL_NUM_THREADS` raises it;
      `OMP_NUM_THREADS` would too, but makes Paddle print a warning at every start.
    * Its MKL takes a slow path on AMD processors unless `MKL_DEBUG_CPU_TYPE` asks for the AVX2 one.
    * Paddle announces each kind of executor that it starts; `GLOG_minloglevel` leaves its warnings and errors.
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
    # Neither concerns anyone who trains: Paddle looks for a compiler cache, setuptools replaces distutils.
    for noise in ("No ccache found", "Setuptools is replacing distutils"):
        warnings.filterwarnings("ignore", message=noise)
