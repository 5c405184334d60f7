"""Runs a job on pictures of shapes, on a CPU, in minutes (`ppdiffusers-train demo`)."""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.reporting.trackers import read_scalars
from ppdiffusers_train.tools.example_files import EXAMPLES, PACKED
from ppdiffusers_train.toy.demo.jobs import JOBS
from ppdiffusers_train.toy.demo.running import generate_images, load_pipeline, train, write_pretrained
from ppdiffusers_train.toy.world.judge import accuracy, look_shares
from ppdiffusers_train.toy.world.shapes import HELD_OUT, caption
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset
from ppdiffusers_train.toy.world.shapes_folder import write_shapes_folder

SHOWN = 24  # of the training pictures
PROMPTS = [caption(content) for content in HELD_OUT[::2]]  # combinations that are held out of training


def run_demo(name: str, output, *flags: str, pictures=None, label=None) -> Path:
    """Train one of `JOBS`, and write a figure of training pictures, images generated before and after, and the loss.

    Args:
        output: folder for the pretrained pipelines, the data, the result and the figure.
        flags: more flags of the training script.
        pictures: number of training pictures, instead of the job's own.
        label: name of the result and the figure, instead of the job's name.
    Returns:
        The figure's file.
    """
    quiet_libraries()
    job, output = JOBS[name], Path(output)
    count = pictures or job.pictures
    data, result = output / f"{job.look}_{count}", output / (label or name)
    print(f"1/3  writing tiny pretrained pipelines and {count} {job.look} pictures", flush=True)
    with writing("--output_dir: pipelines", output, kind=UserError):
        base = write_pretrained(job, output / "pretrained" / job.family)
    if not data.exists():
        write_shapes_folder(data, ShapesDataset(0, count, looks=(job.look,)))
    print(f"2/3  training: {job.script}", flush=True)
    train(job, base, data, result, *flags)
    print("3/3  generating images before and after", flush=True)
    before = generate_images(load_pipeline(job, base), PROMPTS, **(job.sampling_before or job.sampling))
    after = generate_images(load_pipeline(job, base, result), PROMPTS, **job.sampling)
    figure = output / f"{result.name}.png"
    training_pictures = [Image.open(path).convert("RGB") for path in sorted(data.glob("*.png"))[:SHOWN]]
    losses = read_scalars(result / "logs", "train/loss")
    with writing("--output_dir: the figure", output):
        plot_figure(training_pictures, {"before": before, "after": after}, losses).savefig(figure, dpi=100)
    for when, images in (("before", before), ("after", after)):
        right, shares = accuracy(images, PROMPTS)["all"], look_shares(images)
        print(f"     {when}: {right:.0%} show what the prompt says, {shares[job.look]:.0%} {job.look}")
    print(f"\n{figure}\n{result}\n\n{what_next()}", flush=True)
    return figure


def plot_figure(training_pictures: list, generated: dict, losses: list):
    """A matplotlib figure: training pictures, a row of images for each entry of `generated`, and the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.4))
    left.suptitle(f"{len(training_pictures)} of the training pictures")
    show_pictures(left.subplots(6, 4), training_pictures)
    rows = right.subfigures(len(generated) + 1, 1, height_ratios=[1.4, *[1] * len(generated)])
    titles = [textwrap.fill(prompt, width=15) for prompt in PROMPTS]
    for row, (when, images) in zip(rows, generated.items()):
        row.supylabel(when, weight="bold")
        show_pictures(row.subplots(1, len(images)), images, titles)
        titles = ()  # above the first row only
    axes = rows[-1].subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.8", lw=1)
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(np.arange(len(mean)) + (window + 1) / 2, mean, color="tab:blue")
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    return figure


def show_pictures(axes, images, titles=()):
    """Show each image in one of the axes, with titles if there are any."""
    titles = list(titles) or [""] * len(images)
    for place, image, title in zip(np.ravel(axes), images, titles):
        place.imshow(np.asarray(image), interpolation="nearest")
        place.set_title(title, fontsize=8)
        place.axis("off")


def what_next() -> str:
    """Commands to try next: every other job, and training on the user's own images."""
    lines = ["Next, try the other jobs:"]
    lines += [f"  ppdiffusers-train demo --job {name}" for name in JOBS]
    lines += ["and your own images, a folder with a metadata.jsonl:", "  ppdiffusers-train check YOUR_FOLDER"]
    if EXAMPLES == PACKED:
        lines.append(f"  ppdiffusers-train examples {EXAMPLES.name}")
    for job in JOBS.values():
        # Kandinsky's scripts default to the published models.
        models = "" if job.family == "kandinsky" else "".join(f" --{flag} YOUR_MODEL" for flag in job.model_flags)
        lines.append(f"  python -u {EXAMPLES.name}/{job.script} --train_data_dir YOUR_FOLDER{models}")
    return "\n".join(lines)
