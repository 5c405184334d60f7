"""Tracing the trained models into graphs, for `--to_static`."""

import paddle

from ppdiffusers_train.module import trained_models


def can_compile_models() -> bool:
    """Whether Paddle can trace ppdiffusers' models, for which it needs PIR: Paddle 2.6 loses their dataclasses."""
    return paddle.framework.use_pir_api()


def compile_models(module) -> None:
    """Make Paddle trace each trained model at the first batch of each shape (`paddle.jit.to_static`).

    Not as one full graph, which would turn dataclasses into generators. Code that cannot be traced runs as it is.
    """
    for model in trained_models(module) if can_compile_models() else ():
        model.forward = paddle.jit.to_static(model.forward, full_graph=False)
