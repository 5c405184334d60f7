"""A repair of Paddle's silu on CPUs."""

import paddle
from paddle.nn import functional

# Below -84.28, x · exp(-x) is beyond float32 in Paddle's formula. From here on silu and its gradient are below 1e-32.
LOWEST = -80.0


def silu_gradient_is_broken() -> bool:
    """Whether the gradient of silu, which is 0 at -100, comes out as NaN there: on CPUs, in Paddle 2.6.2 and 3.3.1."""
    number = paddle.full([1], -100.0)
    number.stop_gradient = False
    try:
        functional.silu(number).backward()
    except RuntimeError:  # FLAGS_check_nan_inf, which a user may have set to find another NaN
        return True
    return bool(paddle.isnan(number.grad))


def repair_silu() -> None:
    """Where the gradient is broken, make silu constant below `LOWEST`: nothing changes but the NaN, which ends runs."""
    if not silu_gradient_is_broken():
        return
    original = functional.silu

    def silu(x, *arguments, **options):
        return original(paddle.clip(x, min=LOWEST), *arguments, **options)

    functional.silu = silu
