"""Images generated during training, by the same code as inference."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.prompts import generate, validation_prompts, wants_images
from ppdiffusers_train.loop.state import TrainingState
from ppdiffusers_train.module import evaluation
from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet
from ppdiffusers_train.runtime.agreement import found_by_main
from ppdiffusers_train.tensor_files import rehearsal

OVER_STEPS = "validation-over-steps"  # folder of the first images, and of their sheet
STEPS_SHOWN = 8  # at most so many steps stand side by side
CLIP_SCORE = "validation/clip_score"  # tag


def generate_validation(module, prompts: list, count: int, seed: int) -> list:
    """For each prompt `count` images, generated from the same seeds every time."""
    with evaluation(module):
        return generate(module, prompts, count, seed)


def check_images(plan: Plan) -> None:
    """Open on rank 0 what validation images need, so that nothing is missing later: parts of the pipeline, without
    reading their weights, schedulers, and the tokens of all prompts.

    Raises:
        UserError: the same on every rank: a file is missing or damaged.
    """
    module, args = plan.module, plan.run.args

    def rehearse():
        unused = module.not_loaded()
        prompts = validation_prompts(args)
        try:
            with rehearsal():
                generate_validation(module, prompts, 1, plan.order.seed)
        except UserError:
            raise
        except (OSError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"--validation_prompts: images cannot be generated ({reason})") from error
        except Exception as error:  # such as memory: it may not occur when they are generated, and is told then
            plan.run.log(f"--validation_prompts: not tried before the first step ({type(error).__name__})")
        finally:
            module.unload(unused)

    if wants_images(args):
        found_by_main(plan.run.ranks, rehearse)


class ValidationImages:
    """Generates the run's validation images. An error costs its images, not the run: it is logged and kept.

    `failures` has a text for each failure, on rank 0.
    """

    def __init__(self, plan: Plan, trackers):
        self.plan, self.trackers, self.failures = plan, trackers, []
        self.prompts = validation_prompts(plan.run.args) if plan.run.ranks.is_main else []

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
        run, module = self.plan.run, self.plan.module
        with state.precision.autocast():
            rows = generate_validation(module, self.prompts, run.args.num_validation_images, self.plan.order.seed)
            score = clip_score(module, self.prompts, rows)
        grid = contact_sheet([Tile(row, [prompt.text]) for row, prompt in zip(rows, self.prompts)], columns=1).image
        folder = run.output_dir / "validation"
        file = folder / f"step-{state.step}.png"
        with writing("--output_dir: validation images", folder):
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(file)
            first = run.output_dir / OVER_STEPS
            write_first(first / f"step-{state.step}", rows)
            over_steps(first, self.prompts).save(first / "over-steps.png")
        run.log(f"step {state.step}: wrote {file.relative_to(run.output_dir)}")
        self.trackers.image("validation", grid, state.step)
        if score is not None:
            run.log(f"step {state.step}: CLIP score {score:.4g}")
            self.trackers.scalars({CLIP_SCORE: score}, state.step)


def clip_score(module, prompts: list, rows: list):
    """The mean of 100 · max(cos, 0) between CLIP's embeddings of images and of their prompts (Hessel et al. 2021, arXiv
    2104.08718, with that factor), or None where the job has no `embed_images_and_prompts`."""
    if not hasattr(module, "embed_images_and_prompts"):
        return None
    texts = [prompt.text for prompt, row in zip(prompts, rows) for _ in row]
    with evaluation(module):
        found = module.embed_images_and_prompts([image for row in rows for image in row], texts)
    images, texts = (np.float32(part) / np.linalg.norm(np.float32(part), axis=1, keepdims=True) for part in found)
    return float(100 * np.maximum((images * texts).sum(1), 0).mean())


def write_first(folder: Path, rows: list) -> None:
    """Write the first image of each prompt, from which `over_steps` is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        row[0].save(folder / f"{number}.png")


def over_steps(folder: Path, prompts: list) -> Image.Image:
    """The first image of each prompt after several steps, side by side. Of many steps, the first and the last ones and
    some between them are shown."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir())
    steps = sorted(int(name[1]) for name in names if name)
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), STEPS_SHOWN)).round().astype(int))
    shown, tiles = [steps[place] for place in places], []
    for number, prompt in enumerate(prompts):
        files = [folder / f"step-{step}" / f"{number}.png" for step in shown]
        there = [(step, Image.open(file).convert("RGB")) for step, file in zip(shown, files) if file.exists()]
        line = f"steps {', '.join(str(step) for step, _ in there)}"
        tiles.append(Tile([image for _, image in there], [prompt.text, line]))
    return contact_sheet(tiles, columns=1).image
