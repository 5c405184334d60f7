"""Pictures drawn while a run trains, by the same code as inference."""

import contextlib

import paddle

from ppdiffusers_train.reporting.images import captioned_grid


@contextlib.contextmanager
def evaluation(module):
    """Within, all of `module` is in evaluation mode and nothing records gradients."""
    modes = [(layer, layer.training) for layer in module.sublayers(include_self=True)]
    module.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        for layer, training in modes:
            layer.training = training


def draw_validation(module, prompts: list, count: int, seed: int):
    """A grid with one row of `count` pictures per prompt, on the same seeds every time."""
    seeds = [seed + index for index in range(count)]
    with evaluation(module):
        images = module.generate([prompt for prompt in prompts for _ in seeds], seeds * len(prompts))
    return captioned_grid([images[start : start + count] for start in range(0, len(images), count)], prompts)
