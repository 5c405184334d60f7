"""The models that learn as graphs that Paddle has traced, behind `--to_static`."""

import paddle

from ppdiffusers_train.module import trained_models


def can_compile_models() -> bool:
    """Whether Paddle can trace models of ppdiffusers: with its newer graph, PIR. Paddle 2.6 loses their dataclasses."""
    return paddle.framework.use_pir_api()


def compile_models(module) -> None:
    """Have Paddle trace each model in which something learns, at its first batch of a shape (`paddle.jit.to_static`).

    Not as one whole graph, which makes generators of dataclasses. What cannot be traced runs as it would without this.
    """
    for model in trained_models(module) if can_compile_models() else ():
        model.forward = paddle.jit.to_static(model.forward, full_graph=False)
