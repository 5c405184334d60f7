"""Runs the jobs of `jobs.py`, and generates images with their base models and results.

job = JOBS["decoder-lora"]
base = write_pretrained(job, "demo/pretrained")
train(job, base, "demo/outlined", "demo/decoder-lora")
images = generate_images(load_pipeline(job, base, "demo/decoder-lora"), prompts, **job.sampling)
"""

import runpy
import sys

import paddle
from ppdiffusers import (
    DiffusionPipeline,
    KandinskyV22CombinedPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.models.lora import load_lora
from ppdiffusers_train.tools.example_files import EXAMPLES
from ppdiffusers_train.toy.demo import pretrained
from ppdiffusers_train.toy.demo.jobs import RESOLUTION, Job

BATCH = 50  # images that are generated at once


def write_pretrained(job: Job, folder, trained=True) -> dict:
    """Write the pipelines that a job starts from. Returns the flags that name them."""
    folders = WRITERS[job.family](folder, trained)
    return dict(zip(job.model_flags, map(str, folders), strict=True))


def train(job: Job, base: dict, data, result, *more: str) -> None:
    """Run the job's script."""
    script = EXAMPLES / job.script
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script))["main"](job.command(base, data, result, *more))
    finally:
        sys.path.remove(str(script.parent))


def load_pipeline(job: Job, base: dict, result=None):
    """The pretrained pipeline, with the result of a run if its folder is given, loaded as a user would."""
    folders = list(base.values())
    if result is not None:
        return USES[job.kind](PIPELINES[job.family], folders, str(result))
    return PIPELINES[job.family](*folders)


def with_decoder(load, folders, result):
    return load(folders[0], result)


def with_decoder_lora(load, folders, result):
    pipe = load(*folders)
    pipe.unet.load_attn_procs(result)
    return pipe


def with_prior(load, folders, result):
    return load(result, folders[1])


def with_prior_lora(load, folders, result):
    pipe = load(*folders)
    pipe.prior_prior.load_attn_procs(result)
    return pipe


def whole_pipeline(load, folders, result):
    return load(result)


def with_lora(load, folders, result):
    pipe = load(*folders)
    pipe.load_lora_weights(result)
    return pipe


def with_transformer_lora(load, folders, result):
    pipe = load(*folders)
    load_lora(pipe.transformer, result)
    return pipe


def with_student(load, folders, result):
    return in_few_steps(load(*folders, unet=UNet2DConditionModel.from_pretrained(f"{result}/unet_target")))


def with_student_lora(load, folders, result):
    return in_few_steps(with_lora(load, folders, result))


def in_few_steps(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def combined(prior, decoder) -> KandinskyV22CombinedPipeline:
    """The combined pipeline of a decoder's folder, or a whole pipeline's, and a prior's folder."""
    prior_parts = {
        f"prior_{name}": part for name, part in DiffusionPipeline.from_pretrained(str(prior)).components.items()
    }
    return KandinskyV22CombinedPipeline.from_pretrained(str(decoder), **prior_parts)


def sd3(folder) -> StableDiffusion3Pipeline:
    """A pipeline that also runs on a CPU."""
    provide_joint_attention()
    return StableDiffusion3Pipeline.from_pretrained(folder)


WRITERS = {
    "kandinsky": pretrained.write_kandinsky,
    "sd3": pretrained.write_sd3,
    "sd": pretrained.write_sd,
    "sdxl": pretrained.write_sdxl,
}
PIPELINES = {
    "kandinsky": combined,
    "sd3": sd3,
    "sd": StableDiffusionPipeline.from_pretrained,
    "sdxl": StableDiffusionXLPipeline.from_pretrained,
}
USES = {
    "decoder": with_decoder,
    "decoder lora": with_decoder_lora,
    "prior": with_prior,
    "prior lora": with_prior_lora,
    "pipeline": whole_pipeline,
    "lora": with_lora,
    "transformer lora": with_transformer_lora,
    "student": with_student,
    "student lora": with_student_lora,
}


def generate_images(pipeline, prompts: list, seed: int = 0, **options) -> list:
    """One PIL image of 32x32 pixels for each prompt."""
    pipeline.set_progress_bar_config(disable=True)
    paddle.seed(seed)
    images = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        images += pipeline(some, height=RESOLUTION, width=RESOLUTION, **options).images
    return images
