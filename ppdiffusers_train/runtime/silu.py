"""A repair of Paddle's silu on CPUs."""

import paddle
from paddle.nn import functional

# exp(88.7) is float32's largest power of e; silu and its gradient are below 1e-35 from here on.
LOWEST = -88.0


def silu_gradient_is_broken() -> bool:
    """Whether the gradient of silu, which is 0 at -100, comes out as NaN: on CPUs, in Paddle 2.6.2 and 3.3.1."""
    number = paddle.full([1], -100.0)
    number.stop_gradient = False
    functional.silu(number).backward()
    return bool(paddle.isnan(number.grad))


def repair_silu() -> None:
    """Where the gradient is broken, make silu constant below `LOWEST`: nothing changes but the NaN, which ends runs."""
    if not silu_gradient_is_broken():
        return
    original = functional.silu

    def silu(x, *arguments, **options):
        return original(paddle.clip(x, min=LOWEST), *arguments, **options)

    functional.silu = silu
