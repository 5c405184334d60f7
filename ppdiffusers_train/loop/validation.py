"""Pictures drawn while a run trains, by the same code as inference."""

import contextlib

import paddle

from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import TrainingState
from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet


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


def generate_validation(module, prompts: list, count: int, seed: int):
    """A grid with one row of `count` pictures per prompt, on the same seeds every time."""
    seeds = [seed + index for index in range(count)]
    with evaluation(module):
        images = module.generate([prompt for prompt in prompts for _ in seeds], seeds * len(prompts))
    rows = [images[start : start + count] for start in range(0, len(images), count)]
    return contact_sheet([Tile(row, [prompt]) for row, prompt in zip(rows, prompts)], columns=1).image


def save_validation_images(plan: Plan, state: TrainingState, trackers) -> None:
    """Draw pictures with what the result would be now, into the run's folder and its trackers."""
    run, args = plan.run, plan.run.args
    with state.result_weights(), run.ranks.only_main("pictures to be drawn") as is_turn:
        if is_turn:
            with state.precision.autocast():
                picture = generate_validation(
                    plan.module, args.validation_prompts, args.num_validation_images, plan.order.seed
                )
            file = run.output_dir / "validation" / f"step-{state.step}.png"
            file.parent.mkdir(exist_ok=True)
            picture.save(file)
            trackers.image("validation", picture, state.step)
