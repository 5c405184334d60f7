"""Fixtures: tiny pipelines, a folder of photographs, and the real scripts."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import contextlib
import gc
import importlib.util
import io
import json
import os
import resource
import shutil
import sys
import tarfile
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import paddle
import pytest
from paddle.base import core

from ppdiffusers_train.cpu.kernel_repairs import repair_kernels

hypothesis.settings.register_profile("any_machine", deadline=None)  # how long an example takes says nothing
hypothesis.settings.load_profile("any_machine")

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "data" / "photos"
KANDINSKY = ROOT / "examples" / "kandinsky2_2"
LCM = ROOT / "examples" / "lcm"
DECODER_SCRIPT = KANDINSKY / "train_text_to_image_decoder.py"


@pytest.fixture(scope="session", autouse=True)
def cheap_garbage_collection():
    """ppdiffusers collects garbage at every load: what the imports have made need not be looked at each time."""
    import ppdiffusers.pipelines  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def repaired_kernels():
    """As in every run, also where a test takes a gradient by itself."""
    repair_kernels()


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Keep the caches of `datasets` and the hub out of the user's home."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    huggingface_hub.constants.HF_HUB_CACHE = str(tmp_path_factory.mktemp("hub"))
    datasets.disable_progress_bars()
    os.environ.pop("HF_TOKEN", None)


def load_script(path):
    """A script of `examples/` as a module, without running it. It finds its neighbours as if it were run."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def decoder_job():
    return load_script(DECODER_SCRIPT)


@pytest.fixture(scope="session")
def kandinsky_jobs():
    """The scripts of Kandinsky 2.2 by name: `{"prior_lora": module, …}`."""
    names = ("decoder", "prior", "decoder_lora", "prior_lora")
    return {name: load_script(KANDINSKY / f"train_text_to_image_{name}.py") for name in names}


@pytest.fixture(scope="session")
def sdxl_jobs():
    """The scripts of SDXL by name: `{"sdxl": module, "lora_sdxl": module}`."""
    names = ("sdxl", "lora_sdxl")
    return {name: load_script(ROOT / "examples" / "sdxl" / f"train_text_to_image_{name}.py") for name in names}


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """The folder of the tiny SDXL."""
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from ppdiffusers_train.toy.models.sdxl import build_sdxl

    quiet_libraries()
    return build_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sd3_jobs():
    """The scripts of SD3 by name: `{"sd3": module, "lora_sd3": module}`."""
    names = ("sd3", "lora_sd3")
    return {name: load_script(ROOT / "examples" / "sd3" / f"train_text_to_image_{name}.py") for name in names}


@pytest.fixture(scope="session")
def sd3(tmp_path_factory):
    """The folder of the tiny SD3."""
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from tests.toy_pipelines import build_sd3

    quiet_libraries()
    return build_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def sd3_flags(sd3, photos, tmp_path):
    """Flags of a short SD3 run; later flags win."""
    return [f"--pretrained_model_name_or_path={sd3}", *short_run(photos)]


@pytest.fixture
def train_sd3(sd3_jobs, sd3_flags, tmp_path):
    """`train_sd3("lora_sd3", *flags, out="out")` runs that script's `main` and returns its output folder."""
    return runner(sd3_jobs, sd3_flags, tmp_path)


@pytest.fixture
def build_sd3_module(sd3_jobs, sd3_flags):
    """`build_sd3_module("sd3", *flags)` is that script's training module."""
    return builder(sd3_jobs, sd3_flags)


@pytest.fixture(scope="session")
def qwen_jobs():
    """The script of Qwen-Image: `{"lora_qwen": module}`."""
    return {"lora_qwen": load_script(ROOT / "examples" / "qwen_image" / "train_qwen_image_lora.py")}


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """The folder of the tiny Qwen-Image."""
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from tests.toy_pipelines import build_qwen_image

    quiet_libraries()
    return build_qwen_image(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def qwen_flags(qwen, photos):
    """Flags of a short Qwen-Image run; later flags win."""
    return [f"--pretrained_model_name_or_path={qwen}", *short_run(photos)]


@pytest.fixture
def train_qwen(qwen_jobs, qwen_flags, tmp_path):
    """`train_qwen("lora_qwen", *flags, out="out")` runs the script's `main` and returns its output folder."""
    return runner(qwen_jobs, qwen_flags, tmp_path)


@pytest.fixture
def build_qwen_module(qwen_jobs, qwen_flags):
    """`build_qwen_module("lora_qwen", *flags)` is the script's training module."""
    return builder(qwen_jobs, qwen_flags)


@pytest.fixture(scope="session")
def lcm_jobs():
    """The scripts of latent consistency distillation by name: `{"lora_sd": module, …}`."""
    names = ("sd", "sdxl", "lora_sd", "lora_sdxl")
    return {name: load_script(LCM / f"train_lcm_distill_{name}_wds.py") for name in names}


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """The folder of the tiny Stable Diffusion."""
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from tests.toy_pipelines import build_sd

    quiet_libraries()
    return build_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sd_jobs():
    """The scripts of Stable Diffusion by name: `{"sd": module, "lora_sd": module}`."""
    folder = ROOT / "examples" / "stable_diffusion"
    return {
        name: load_script(folder / f"train_text_to_image{end}.py")
        for name, end in {"sd": "", "lora_sd": "_lora"}.items()
    }


@pytest.fixture
def sd_flags(sd, photos):
    """Flags of a short Stable Diffusion run; later flags win."""
    return [f"--pretrained_model_name_or_path={sd}", *short_run(photos), "--resolution=32"]


@pytest.fixture
def train_sd(sd_jobs, sd_flags, tmp_path):
    """`train_sd("lora_sd", *flags, out="out")` runs that script's `main` and returns its output folder."""
    return runner(sd_jobs, sd_flags, tmp_path)


@pytest.fixture
def build_sd_module(sd_jobs, sd_flags):
    """`build_sd_module("sd", *flags)` is that script's training module."""
    return builder(sd_jobs, sd_flags)


@pytest.fixture
def sdxl_flags(sdxl, photos, tmp_path):
    """Flags of a short SDXL run; later flags win."""
    return [f"--pretrained_model_name_or_path={sdxl}", *short_run(photos)]


@pytest.fixture
def train_sdxl(sdxl_jobs, sdxl_flags, tmp_path):
    """`train_sdxl("lora_sdxl", *flags, out="out")` runs that script's `main` and returns its output folder."""
    return runner(sdxl_jobs, sdxl_flags, tmp_path)


@pytest.fixture
def build_sdxl_module(sdxl_jobs, sdxl_flags):
    """`build_sdxl_module("sdxl", *flags)` is that script's training module."""
    return builder(sdxl_jobs, sdxl_flags)


def runner(jobs, flags, tmp_path):
    """`run(name, *more, out="out")` runs the script of that name with `flags` and returns its output folder."""

    def run(name, *more, out="out"):
        jobs[name].main([*flags, f"--output_dir={tmp_path / out}", *map(str, more)])
        return tmp_path / out

    return run


def module_class(job):
    """The training module that a script defines."""
    modules = (value for name, value in vars(job).items() if name.endswith("TrainingModule"))
    return next(value for value in modules if value.__module__ == job.__name__)


def builder(jobs, flags):
    """`build(name, *more)` is the training module of the script of that name, with `flags`."""

    def build(name, *more):
        job = jobs[name]
        return module_class(job)(job.build_parser().parse_args([*flags, *map(str, more)]))

    return build


@pytest.fixture(scope="session")
def kandinsky(tmp_path_factory):
    """(prior folder, decoder folder) of the tiny Kandinsky 2.2."""
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from ppdiffusers_train.toy.models.kandinsky2_2 import build_kandinsky

    quiet_libraries()
    return build_kandinsky(tmp_path_factory.mktemp("kandinsky"), channels=(16, 32))


def copy_photos(folder, count):
    """A folder of the first `count` photographs with their captions."""
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (PHOTOS / "metadata.jsonl").read_text().splitlines()][:count]
    for row in rows:
        shutil.copy(PHOTOS / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 7 photographs: an odd number, so that batches and windows come out short."""
    return copy_photos(tmp_path_factory.mktemp("data") / "photos", 7)


def photo_shards(photos, folder, shards=3):
    """A folder of tar shards, `0.tar` to `2.tar`, with the photographs of another."""
    folder.mkdir()
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for row in rows[shard::shards]:
                file, text = photos / row["file_name"], row["text"].encode()
                archive.add(file, file.name)
                member = tarfile.TarInfo(f"{file.stem}.txt")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
    return folder


@pytest.fixture
def decoder_flags(kandinsky, photos, tmp_path):
    """Flags of a short Kandinsky run into `tmp_path/out`; later flags win."""
    prior, decoder = kandinsky
    return [
        f"--pretrained_decoder_model_name_or_path={decoder}",
        f"--pretrained_prior_model_name_or_path={prior}",
        f"--output_dir={tmp_path / 'out'}",
        *short_run(photos),
    ]


def guide_on_toys(job, words, *more):
    """A guide's flags for a run of one step on tiny models, offline; all of them are read first.

    Args:
        job: the script.
        words: the flags of the guide.
        more: flags that the script needs beside them.
    """
    job.build_parser().parse_args(words)
    elsewhere = ("--dataset_name", "--pretrained", "--report_to", "--push_to_hub", "--output_dir", "--resume")
    kept = [word for word in words if not word.startswith(elsewhere)]
    return [*kept, *more, "--resolution=64", "--max_train_steps=1", "--validation_inference_steps=2"]


def short_run(photos):
    """Flags of two small steps."""
    return [
        f"--train_data_dir={photos}",
        "--resolution=64",
        "--train_batch_size=2",
        "--max_train_steps=2",
        "--learning_rate=1e-3",
        "--seed=0",
    ]


@pytest.fixture
def train(kandinsky_jobs, decoder_flags, tmp_path):
    """`train("prior_lora", *flags, out="out")` runs that script's `main` and returns its output folder."""
    return runner(kandinsky_jobs, decoder_flags, tmp_path)


@pytest.fixture
def train_decoder(train):
    """`train_decoder(*flags, out="out")` does so for the decoder."""
    return partial(train, "decoder")


@pytest.fixture
def build(kandinsky_jobs, decoder_flags):
    """`build("prior_lora", *flags)` is that script's training module."""
    return builder(kandinsky_jobs, decoder_flags)


def last_error(capsys):
    """The last line that was printed to standard error."""
    return capsys.readouterr().err.splitlines()[-1]


@contextlib.contextmanager
def no_file_above(size):
    """What a full disk does to a write: the system refuses to let a file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def encode(module, rows, indices):
    """Rows of a dataset through `preprocess` and `encode`."""
    from ppdiffusers_train.data.loader import stack
    from ppdiffusers_train.draws import RowDraws
    from ppdiffusers_train.module import encode_batch

    return encode_batch(module, stack([module.preprocess(rows[index], RowDraws(0, index)) for index in indices])[0])


HUBER = ["--loss_type=huber", "--huber_c=0.3"]
LEVERS = [  # flags that all denoising jobs have
    ["--snr_gamma=1"], ["--debiased_loss"], ["--input_perturbation=0.3"], ["--ip_noise_gamma=0.6"],
    ["--loss_type=huber"], HUBER, [*HUBER, "--huber_schedule=constant"], [*HUBER, "--huber_schedule=exponential"],
    ["--loss_type=smooth_l1", "--huber_c=0.3"], ["--loss_type=huber", "--huber_c=0.3", "--debiased_loss"],
]  # fmt: skip
OF_LATENTS = [
    ["--noise_offset=0.5"], ["--multires_noise_discount=0.5"], ["--multires_noise_discount=0.8"],
    ["--multires_noise_discount=0.5", "--multires_noise_iterations=2"],
]  # fmt: skip


def first_losses(build, *flag_lists):
    """The losses of two samples, as the modules compute them that `build(*flags)` makes of lists of flags. Samples are
    encoded by the first one."""
    from ppdiffusers_train.data.dataset import build_dataset
    from ppdiffusers_train.draws import Draws

    losses, encoded = [], None
    for flags in flag_lists:
        module = build(*flags)
        module.eval()
        with paddle.no_grad():
            encoded = encoded or encode(module, build_dataset(module.args), [0, 1])
            losses.append(float(f"{module(encoded, Draws(7, [0, 1])).item():.6g}"))
    return losses


def kept_for_backward(module):
    """Bytes that the forward pass of two samples keeps for the backward pass, and the gradients that come of it."""
    from ppdiffusers_train.data.dataset import build_dataset
    from ppdiffusers_train.draws import Draws
    from ppdiffusers_train.loop.step import set_training_mode

    set_training_mode(module)
    encoded = encode(module, build_dataset(module.args), [0, 1])
    gc.collect()  # what earlier modules have left behind would be freed in between
    before = core.host_memory_stat_current_value("Allocated", 0)
    loss = module(encoded, Draws(0, [0, 1]))
    kept = core.host_memory_stat_current_value("Allocated", 0) - before
    loss.backward()
    # Text encoders have layers whose results SDXL does not use.
    return kept, [parameter.grad.numpy() for parameter in module.trainable_parameters() if parameter.grad is not None]


def check_recompute(build, name, *flags):
    """Recompute keeps at most a quarter for the backward pass, and gives the same gradients: to the bit where Paddle
    recomputes without reentrance, else up to another order of sums. Dropout draws the same numbers again."""
    import paddle

    from ppdiffusers_train.models.recompute import recomputes_without_reentrance

    found = []
    for flag in ([], ["--gradient_checkpointing"]):
        module = build(name, *flags, *flag)
        paddle.seed(7)
        found.append(kept_for_backward(module))
    (plain, expected), (less, gradients) = found
    assert less < 0.25 * plain
    for one, other in zip(expected, gradients, strict=True):
        assert np.array_equal(one, other) or not recomputes_without_reentrance()
        assert np.abs(one - other).max() <= 1e-7


def same(one, other):
    """Whether two dictionaries of arrays agree to the bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def distance(one, other):
    """The largest difference between two dictionaries of arrays."""
    return max(np.abs(one[name] - other[name]).max() for name in one)


def optimizer_state(checkpoint):
    """The optimizer's tensors in a checkpoint."""
    return tensors(checkpoint / "optimizer.safetensors")


def tensors(file):
    """The arrays of a safetensors file."""
    from safetensors.numpy import load_file

    return load_file(file)


def encoded_samples(cache):
    """{(folder of the encoders, key): arrays} of all samples in a cache."""
    from ppdiffusers_train.data.packs import open_packs

    found = {}
    for folder in filter(Path.is_dir, Path(cache).iterdir()):
        for pack in open_packs(folder)[0]:
            found |= {(folder.name, bytes(key)): pack.read(row) for row, key in enumerate(pack.keys)}
    return found


def scalars(output_dir, tag="train/loss", logging_dir="logs"):
    """The values of a scalar that a run reported to VisualDL, in order of steps, over all its starts."""
    from ppdiffusers_train.reporting.trackers import read_scalars

    return read_scalars(output_dir / logging_dir, tag)


def weights(folder, name="unet"):
    """The weights that a model's `save_pretrained` wrote, as NumPy arrays."""
    return tensors(folder / name / "diffusion_paddle_model.safetensors")


def held_out_prompts(count):
    """Captions in all wordings of combinations that no training has had."""
    from ppdiffusers_train.toy.world.shapes import HELD_OUT, WORDINGS, caption

    wordings = [wording for several in WORDINGS.values() for wording in several]
    return [
        caption(HELD_OUT[number % len(HELD_OUT)], wordings[number // len(HELD_OUT) % len(wordings)])
        for number in range(count)
    ]
