"""Images generated during training, by the same code as inference."""

import contextlib

import paddle

from ppdiffusers_train.errors import WriteError, writing
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import TrainingState
from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet


@contextlib.contextmanager
def evaluation(module):
    """A context in which all of `module` is in evaluation mode and no gradients are recorded."""
    modes = [(layer, layer.training) for layer in module.sublayers(include_self=True)]
    module.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        for layer, training in modes:
            layer.training = training


def generate_validation(module, prompts: list, count: int, seed: int):
    """A grid with one row of `count` images per prompt, generated from the same seeds every time."""
    seeds = [seed + index for index in range(count)]
    with evaluation(module):
        images = module.generate([prompt for prompt in prompts for _ in seeds], seeds * len(prompts))
    rows = [images[start : start + count] for start in range(0, len(images), count)]
    return contact_sheet([Tile(row, [prompt]) for row, prompt in zip(rows, prompts)], columns=1).image


def save_validation_images(plan: Plan, state: TrainingState, trackers) -> None:
    """Generate images with the weights that the result would have now, for the run's folder and its trackers."""
    run, args = plan.run, plan.run.args
    with state.result_weights(), run.ranks.only_main("images to be generated") as is_main:
        if is_main:
            with state.precision.autocast():
                grid = generate_validation(
                    plan.module, args.validation_prompts, args.num_validation_images, plan.order.seed
                )
            file = run.output_dir / "validation" / f"step-{state.step}.png"
            try:
                with writing("--output_dir: validation images", file.parent, "continuing without them"):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    grid.save(file)
                run.log(f"step {state.step}: wrote {file.relative_to(run.output_dir)}")
            except WriteError as error:  # they are worth less than the steps since the last checkpoint
                run.log(str(error))
            trackers.image("validation", grid, state.step)
