"""Images generated during training, by the same code as inference."""

import contextlib

import paddle

from ppdiffusers_train.errors import writing
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


class ValidationImages:
    """Generates the run's validation images. An error costs its images, not the run: it is logged and kept.

    `failures` has a text for each failure, on rank 0.
    """

    def __init__(self, plan: Plan, trackers):
        self.plan, self.trackers, self.failures = plan, trackers, []

    def generate(self, state: TrainingState) -> None:
        """Generate images with the weights that the result would have now, for the run's folder and its trackers."""
        run = self.plan.run
        with state.result_weights(), run.ranks.only_main("images to be generated") as is_main:
            if not is_main:
                return
            try:
                self._write(state)
            except Exception as error:  # whatever a pipeline stumbles over: memory, a missing part, a full disk
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self.failures.append(f"after step {state.step}: {reason}")
                run.log(f"step {state.step}: no validation images, {reason}")

    def _write(self, state: TrainingState) -> None:
        run, args = self.plan.run, self.plan.run.args
        with state.precision.autocast():
            grid = generate_validation(
                self.plan.module, args.validation_prompts, args.num_validation_images, self.plan.order.seed
            )
        file = run.output_dir / "validation" / f"step-{state.step}.png"
        with writing("--output_dir: validation images", file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            grid.save(file)
        run.log(f"step {state.step}: wrote {file.relative_to(run.output_dir)}")
        self.trackers.image("validation", grid, state.step)
