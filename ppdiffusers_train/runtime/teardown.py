"""The end of a process that has computed on a device."""

import atexit
import functools
import gc

from paddle.base.framework import default_main_program


@functools.cache
def release_tensors_at_exit() -> None:
    """Free all tensors before Paddle takes its devices down, which it does before Python frees what is left.

    A tensor that is freed later reads memory of a device that is gone: on plugin devices the process ends with SIGSEGV,
    after all its work. What is left are cycles, of layers and hooks, and an optimizer's learning rate, which Paddle
    keeps in its default program.
    """
    atexit.register(_release_tensors)  # handlers run in reverse order, and Paddle's are there already


def _release_tensors() -> None:
    vars(default_main_program()).pop("lr_var", None)
    gc.collect()
