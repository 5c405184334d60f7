"""What prior preservation is for: a subject is learned, and its class stays what it was."""

from pathlib import Path

import numpy as np
from PIL import Image

from ppdiffusers_train.draws import generator
from ppdiffusers_train.toy.demo.jobs import COSINE, DROPOUT, SAMPLING, Job
from ppdiffusers_train.toy.demo.running import generate_images, load_pipeline, train, write_pretrained
from ppdiffusers_train.toy.world.judge import Reading, judge
from ppdiffusers_train.toy.world.shapes import Content, Scene, render

JOB = Job(
    "stable_diffusion/train_text_to_image.py",
    ("--train_batch_size=8", "--max_train_steps=400", "--learning_rate=5e-4", *COSINE, DROPOUT),
    SAMPLING,
    "pipeline",
    "plain",
)
# The subject is an outlined purple circle, of which captions name nothing but the background.
SUBJECT, CLASS = "a sks circle on a white background", "a red circle on a white background"
PRIOR = ("--class_prompt", CLASS, "--num_class_images=100", "--with_prior_preservation", "--prior_loss_weight=1.0")
IMAGES = 67  # that are judged of each


def write_subject(folder: Path) -> None:
    """Five pictures of the subject, without captions."""
    folder.mkdir(parents=True)
    for index in range(5):
        x, y, radius = generator(0, index, "subject").uniform([0.4, 0.4, 0.26], [0.6, 0.6, 0.34])
        scene = Scene(Content("circle", "purple", "white"), "outlined", x, y, radius)
        Image.fromarray(render(scene, 32)).save(folder / f"{index}.png")


def shares(pipeline) -> dict:
    """Shares of images of the subject that show it, and of its class that show what their caption says, unlike it."""
    subject, others = (
        [judge(image) for image in generate_images(pipeline, [prompt] * IMAGES, **SAMPLING)]
        for prompt in (SUBJECT, CLASS)
    )
    shown = [seen == Reading(Content("circle", "purple", "white"), "outlined") for seen in subject]
    kept = [seen == Reading(Content("circle", "red", "white"), "plain") for seen in others]
    return {"subject": float(np.mean(shown)), "class": float(np.mean(kept))}


def subject(folder: Path) -> dict:
    """{run: shares} of the base, and of runs with and without class images."""
    base = write_pretrained(JOB, folder / "base")
    if not (folder / "subject").exists():
        write_subject(folder / "subject")
    figures = {"before": shares(load_pipeline(JOB, base))}
    if not (folder / "class").exists():  # not by the job: its guidance, the pipeline's 7.5, is too much for this one
        (folder / "class").mkdir()
        for index, image in enumerate(generate_images(load_pipeline(JOB, base), [CLASS] * 100, seed=1, **SAMPLING)):
            image.save(folder / "class" / f"{index:02}.png")
    prior = (*PRIOR, f"--class_data_dir={folder / 'class'}")
    for name, flags in {"with class images": prior, "without": ()}.items():
        result = folder / name.replace(" ", "-")
        train(JOB, base, folder / "subject", result, f"--instance_prompt={SUBJECT}", *flags)
        figures[name] = shares(load_pipeline(JOB, base, result))
    return figures
