"""What each job is to show on the world of shapes: runs of the real scripts, their pictures read by the judge."""

from ppdiffusers_train import cli

import json
from pathlib import Path

from PIL import Image

from ppdiffusers_train.models.lora_files import read_lora
from ppdiffusers_train.models.lora_libraries import FILES
from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet
from ppdiffusers_train.toy.demo.demo import run_demo
from ppdiffusers_train.toy.demo.jobs import DROPOUT, JOBS, LONGEST, MANY, SAMPLING, Job
from ppdiffusers_train.toy.demo.running import generate_images, load_pipeline, train, write_pretrained
from ppdiffusers_train.toy.world.judge import NAMES, accuracy, look_shares
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset
from ppdiffusers_train.toy.world.shapes_folder import write_shapes_folder
from tests.conftest import held_out_prompts
from tests.gate.confusion import confusion_table
from tests.gate.subject import subject
from tests.toy_pipelines import pretrained_sampling

PROMPTS = held_out_prompts(200)
THIRD = PROMPTS[::3]  # 67 with each content and each wording; a look or an option is seen in as many
# The demo learns from 24 pictures in less than a minute; what LoRA can do beyond shows with more of both.
LONGER = {"decoder-lora, longer": ("decoder-lora", ("--rank=22", *LONGEST), MANY)}
FINE_TUNING = [*(name for name, job in JOBS.items() if not job.distils), *LONGER]
DISTILLATION = [name for name, job in JOBS.items() if job.distils]
FAMILIES = {"kandinsky": "decoder", "sd": "lcm", "sdxl": "lcm-sdxl", "sd3": "sd3"}  # a job that starts from it


def measure(pipeline, sampling: dict, prompts) -> dict:
    """Shares of pictures with the shape, colour and background asked for, with all three, and in each look."""
    images = generate_images(pipeline, prompts, **sampling)
    return {**accuracy(images, prompts), **look_shares(images)}


def pretrained(family: str, folder: Path) -> dict:
    """How a shipped pipeline draws captions whose combination it has never seen."""
    job = JOBS[FAMILIES[family]]
    pipeline = load_pipeline(job, write_pretrained(job, folder / "pretrained" / family))
    images = generate_images(pipeline, PROMPTS, **pretrained_sampling(job))
    enlarged = [image.resize((64, 64), Image.Resampling.NEAREST) for image in images[:100]]
    tiles = [Tile(enlarged[start : start + 20], []) for start in range(0, 100, 20)]
    contact_sheet(tiles, columns=1).image.save(folder / f"pretrained-{family}.png")
    return {
        **accuracy(images, PROMPTS),
        **look_shares(images),
        "confusion": {field: confusion_table(images, PROMPTS, field) for field in NAMES},
    }


def new_look(name: str, folder: Path) -> dict:
    """What fine-tuning on pictures in a new look changes."""
    job, base, result = run_job(name, folder)
    figures = {"before": run(f"pretrained {job.family}", folder)}
    figures["after"] = measure(load_pipeline(job, base, result), job.sampling, THIRD)
    if job.kind.endswith("lora"):
        figures["share of parameters"] = share_that_learns(job, base, result)
        half = load_pipeline(job, base, scaled_lora(result, 0.5))
        figures["scale 0.5"] = measure(half, job.sampling, THIRD)
        unchanged, original = (
            generate_images(load_pipeline(job, base, lora), THIRD[:8], **job.sampling)
            for lora in (scaled_lora(result, 0.0), None)
        )
        figures["scale 0 is the base"] = [a.tobytes() for a in unchanged] == [b.tobytes() for b in original]
    return figures


def scaled_lora(result: Path, scale: float) -> Path:
    """A folder beside `result` with its LoRA times `scale`."""
    scaled = result.with_name(f"{result.name}-times-{scale}")
    cli.main(
        ["convert-lora", str(result), "--to", "ppdiffusers", "--scale", str(scale)]
        + ["--output", str(scaled / FILES["ppdiffusers"])]
    )
    return scaled


def share_that_learns(job: Job, base: dict, result: Path) -> float:
    """The number of LoRA's parameters beside that of the model that it changes."""
    pipe = load_pipeline(job, base)
    model = pipe.prior_prior if "prior" in job.kind else pipe.transformer if "transformer" in job.kind else pipe.unet
    learned = sum(update.down.size + update.up.size for update in read_lora(result / FILES["ppdiffusers"]).values())
    return learned / sum(parameter.size for parameter in model.parameters())


def few_steps(name: str, folder: Path) -> dict:
    """What distillation makes of drawing in four steps."""
    job, base, result = run_job(name, folder)
    return {
        "teacher, 50 steps": run(f"pretrained {job.family}", folder),
        "teacher, 4 steps": measure(load_pipeline(job, base), job.sampling_before, PROMPTS),
        "student, 4 steps": measure(load_pipeline(job, base, result), job.sampling, PROMPTS),
    }


def run_job(name: str, folder: Path) -> tuple:
    """The job, the flags that name what it started from, and the folder of its result, after `run_demo` has made it."""
    of, flags, pictures = LONGER.get(name, (name, (), None))
    picture = run_demo(of, folder, *flags, pictures=pictures, label=name)
    job = JOBS[of]
    return job, write_pretrained(job, folder / "pretrained" / job.family), picture.with_suffix("")


def job_of(name: str) -> Job:
    """The job of an experiment, which may be a longer run of it."""
    return JOBS[LONGER.get(name, [name])[0]]


# What options do to a training from the start: Stable Diffusion's UNet, on plain pictures.

FROM_START = Job(
    "stable_diffusion/train_text_to_image.py",
    ("--encoded_cache", "--train_batch_size=16", "--max_train_steps=2000", "--learning_rate=1e-3"),
    SAMPLING,
    "pipeline",
    "plain",
)
COSINE = ("--lr_scheduler=cosine", "--lr_warmup_steps=50")
RUNS = {
    "plain": (*COSINE, DROPOUT),
    "min-SNR": (*COSINE, DROPOUT, "--snr_gamma=5.0"),
    "no dropped captions": COSINE,
    "constant rate": (DROPOUT, "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=50"),
    "constant rate, EMA": (DROPOUT, "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=50", "--use_ema"),
    "one sample at a time": (*COSINE, DROPOUT, "--train_batch_size=1", "--gradient_accumulation_steps=16"),
}
GUIDANCE, JUDGED = (1.0, 3.0, 7.5), 3.0


def options(folder: Path) -> dict:
    """{run: {guidance scale: figures}} of short trainings from the same random weights that differ in an option."""
    data, count = folder / "pictures", 2000
    if not data.exists():
        write_shapes_folder(data, ShapesDataset(0, count, looks=("plain",)))
    base = write_pretrained(FROM_START, folder / "random", trained=False)
    figures = {}
    for name, flags in RUNS.items():
        result = folder / name.replace(" ", "-").replace(",", "")
        train(FROM_START, base, data, result, *flags, f"--encoded_cache_dir={folder / 'encoded'}")
        pipeline = load_pipeline(FROM_START, base, result)
        figures[name] = {
            str(scale): measure(pipeline, {**SAMPLING, "guidance_scale": scale}, THIRD) for scale in GUIDANCE
        }
    return figures


EXPERIMENTS = {
    **{f"pretrained {family}": lambda folder, family=family: pretrained(family, folder) for family in FAMILIES},
    **{name: lambda folder, name=name: new_look(name, folder) for name in FINE_TUNING},
    **{name: lambda folder, name=name: few_steps(name, folder) for name in DISTILLATION},
    "options": lambda folder: options(folder / "options"),
    "subject": lambda folder: subject(folder / "subject-and-class"),
}


def run(name: str, folder: Path) -> dict:
    """The figures of an experiment, also written to `folder/NAME.json`; those that are there already are read."""
    file = folder / f"{name}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        figures = EXPERIMENTS[name](folder)
        file.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))
