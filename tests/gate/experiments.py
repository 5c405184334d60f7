"""What each job is to show on the world of shapes: runs of the real scripts, their pictures read by the judge."""

import json
from pathlib import Path

from ppdiffusers_train import cli
from ppdiffusers_train.models.lora_files import FILES
from ppdiffusers_train.reporting.images import captioned_grid
from ppdiffusers_train.toy.demo import run_demo
from ppdiffusers_train.toy.jobs import JOBS, SD_DRAWING, Job
from ppdiffusers_train.toy.judge import NAMES, accuracy, confusion_table, judge
from ppdiffusers_train.toy.running import draw, load_pipeline, train, write_pretrained
from ppdiffusers_train.toy.shapes import HELD_OUT, LOOKS, WORDINGS, caption
from ppdiffusers_train.toy.shapes_dataset import ShapesDataset
from ppdiffusers_train.toy.shapes_folder import write_shapes_folder

ALL_WORDINGS = [wording for wordings in WORDINGS.values() for wording in wordings]
PROMPTS = [caption(content, ALL_WORDINGS[number % len(ALL_WORDINGS)]) for number in range(10) for content in HELD_OUT]
FAMILIES = {"kandinsky": "decoder", "sd": "lcm", "sdxl": "sdxl"}  # a job that starts from it


def measure(pipeline, drawing: dict, prompts=PROMPTS) -> dict:
    """Shares of pictures with the shape, colour and background asked for, with all three, and in each look."""
    images = draw(pipeline, prompts, **drawing)
    looks = [judge(image).look for image in images]
    return {**accuracy(images, prompts), **{look: looks.count(look) / len(looks) for look in LOOKS}}


def pretrained(family: str, folder: Path) -> dict:
    """How a shipped pipeline draws captions whose combination it has never seen."""
    job = JOBS[FAMILIES[family]]
    drawing = {**SD_DRAWING, "num_inference_steps": 50} if job.distils else job.drawing
    images = draw(load_pipeline(job, write_pretrained(job, folder / family)), PROMPTS, **drawing)
    sheet = [images[start : start + 20] for start in range(0, 100, 20)]
    captioned_grid(sheet, [""] * len(sheet), scale=2).save(folder / f"pretrained-{family}.png")
    looks = [judge(image).look for image in images]
    return {
        **accuracy(images, PROMPTS),
        **{look: looks.count(look) / len(looks) for look in LOOKS},
        "confusion": {field: confusion_table(images, PROMPTS, field) for field in NAMES},
    }


def new_look(name: str, folder: Path) -> dict:
    """What fine-tuning on 24 outlined pictures changes."""
    job, base = run_job(name, folder)
    figures = {"before": measure(load_pipeline(job, base), job.drawing)}
    figures["after"] = measure(load_pipeline(job, base, folder / name), job.drawing)
    if job.kind.endswith("lora"):
        for scale in (0.5, 0.0):
            scaled = folder / f"{name}-times-{scale}"
            cli.main(
                ["convert-lora", str(folder / name), "--to", "ppdiffusers", "--scale", str(scale)]
                + ["--output", str(scaled / FILES["ppdiffusers"])]
            )
            figures[f"scale {scale}"] = measure(load_pipeline(job, base, scaled), job.drawing)
        some = PROMPTS[:8]
        unchanged, original = (
            draw(load_pipeline(job, base, result), some, **job.drawing)
            for result in (folder / f"{name}-times-0.0", None)
        )
        figures["scale 0 is the base"] = [a.tobytes() for a in unchanged] == [b.tobytes() for b in original]
    return figures


def few_steps(name: str, folder: Path) -> dict:
    """What distillation makes of drawing in four steps."""
    job, base = run_job(name, folder)
    teacher = load_pipeline(job, base)
    return {
        "teacher, 50 steps": measure(teacher, {**SD_DRAWING, "num_inference_steps": 50}),
        "teacher, 4 steps": measure(teacher, job.drawing_before),
        "student, 4 steps": measure(load_pipeline(job, base, folder / name), job.drawing),
    }


def run_job(name: str, folder: Path) -> tuple:
    """The job and the flags that name what it started from, after `run_demo` has trained it into `folder`."""
    run_demo(name, folder)
    job = JOBS[name]
    return job, write_pretrained(job, folder / "pretrained" / job.family)
