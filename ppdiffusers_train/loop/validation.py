"""Images generated during training, by the same code as inference."""

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import TrainingState
from ppdiffusers_train.module import evaluation
from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet
from ppdiffusers_train.runtime.agreement import found_by_main
from ppdiffusers_train.tensor_files import rehearsal


def generate_validation(module, prompts: list, count: int, seed: int):
    """A grid with one row of `count` images per prompt, generated from the same seeds every time."""
    seeds = [seed + index for index in range(count)]
    with evaluation(module):
        images = module.generate([prompt for prompt in prompts for _ in seeds], seeds * len(prompts))
    rows = [images[start : start + count] for start in range(0, len(images), count)]
    return contact_sheet([Tile(row, [prompt]) for row, prompt in zip(rows, prompts)], columns=1).image


def check_images(plan: Plan) -> None:
    """Open on rank 0 what validation images need, so that nothing is missing later: parts of the pipeline, without
    reading their weights, schedulers, and the tokens of all prompts.

    Raises:
        UserError: the same on every rank: a file is missing or damaged.
    """
    module, args = plan.module, plan.run.args

    def rehearse():
        unused = module.not_loaded()
        try:
            with rehearsal():
                generate_validation(module, args.validation_prompts, 1, plan.order.seed)
        except UserError:
            raise
        except (OSError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"--validation_prompts: images cannot be generated ({reason})") from error
        except Exception as error:  # such as memory: it may not occur when they are generated, and is told then
            plan.run.log(f"--validation_prompts: not tried before the first step ({type(error).__name__})")
        finally:
            module.unload(unused)

    if args.validation_prompts:
        found_by_main(plan.run.ranks, rehearse)


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
