import ppdiffusers_train  # noqa: F401

import platform

import numpy as np
import pytest

from ppdiffusers_train.cpu.free_memory import return_free_memory


def resident_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.once
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory in other ways")
def test_memory_that_is_free_is_given_back():
    blocks = [np.ones(2**14, np.float32) for _ in range(4000)]  # 64 KB each: the C library keeps such blocks
    kept, full = blocks[-1], resident_mb()
    del blocks
    freed = resident_mb()
    return_free_memory()
    assert freed - resident_mb() > 200 and full > 250 and kept[0] == 1
