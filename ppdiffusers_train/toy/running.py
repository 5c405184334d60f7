"""Running the jobs of `jobs.py`, and drawing with what they started from and made.

job = JOBS["prior-lora"]
base = write_pretrained("demo/pretrained")
train(job, base, "demo/striped", "demo/prior-lora")
images = draw(load_pipeline(job, base, "demo/prior-lora"), prompts, **DRAWING)
"""

import runpy
import sys

import paddle
from ppdiffusers import DiffusionPipeline, KandinskyV22CombinedPipeline

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.toy import pretrained
from ppdiffusers_train.toy.jobs import EXAMPLES, RESOLUTION, Job

BATCH = 50  # pictures that are drawn at once


def write_pretrained(folder, trained=True) -> dict:
    """Write the pipelines that a job starts from; returns the flags that name them."""
    prior, decoder = pretrained.write_kandinsky(folder, trained)
    return {"pretrained_prior_model_name_or_path": str(prior), "pretrained_decoder_model_name_or_path": str(decoder)}


def train(job: Job, base: dict, data, result, *more: str) -> None:
    """Run the script."""
    script = EXAMPLES / job.script
    if not script.is_file():
        raise UserError(
            f"{job.script} is not there; expected the package to be installed from a checkout, pip install -e"
        )
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script))["main"](job.command(base, data, result, *more))
    finally:
        sys.path.remove(str(script.parent))


def load_pipeline(job: Job, base: dict, result=None) -> KandinskyV22CombinedPipeline:
    """The pretrained pipeline, with what a run has made where its folder is given: the way a user loads it."""
    prior, decoder = base.values()
    if result is None:
        return combined(prior, decoder)
    if not job.lora:
        return combined(result, decoder)
    pipe = combined(prior, decoder)
    pipe.prior_prior.load_attn_procs(str(result))
    return pipe


def combined(prior, decoder) -> KandinskyV22CombinedPipeline:
    """A decoder's folder with the parts of a prior's."""
    prior_parts = {
        f"prior_{name}": part for name, part in DiffusionPipeline.from_pretrained(str(prior)).components.items()
    }
    return KandinskyV22CombinedPipeline.from_pretrained(str(decoder), **prior_parts)


def draw(pipeline, prompts: list, seed: int = 0, **options) -> list:
    """One PIL image of 32x32 pixels for each prompt."""
    pipeline.set_progress_bar_config(disable=True)
    paddle.seed(seed)
    images = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        images += pipeline(some, height=RESOLUTION, width=RESOLUTION, **options).images
    return images
