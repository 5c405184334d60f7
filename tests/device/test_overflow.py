"""float16 that overflows, by its numbers alone: gradients too large for it under the first loss scale, and models whose
activations are."""

import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.conftest import encoded_samples, scalars, tensors
from tests.device.files import differing, not_finite
from tests.device.jobs import Jobs

pytestmark = pytest.mark.once

STEPS = 8
# Updates of LoRA are multiplied by alpha / rank. So are gradients on their way to its layers, in float16: by 512, while
# the loss is scaled by 65536. A tiny learning rate keeps the updates themselves small.
STEEP = ["--lora_rank=4", f"--lora_alpha={4 * 512}", "--learning_rate=1e-7"]
OVERFLOWS = {
    "decoder_lora": STEEP,
    "decoder_lora 8-bit": [*STEEP, "--use_8bit_adam"],
    "prior": [],
    "prior 8-bit": ["--use_8bit_adam"],
    "prior O2": ["--amp_level=O2"],
}


def test_steps_that_overflow_leave_everything_but_the_position(jobs, on_device, tmp_path):
    """With AdamW and with 8 bits. The first steps overflow, until the scale fits; the others learn. The prior says too
    much, and has a loss and gradients to match."""
    prior, decoder = jobs.models["kandinsky"]
    jobs.models["kandinsky"] = shutil.copytree(prior, tmp_path / "loud_prior"), decoder
    multiply(tmp_path / "loud_prior" / "prior", ["proj_to_clip_embeddings.weight"], 2)
    flags = [f"--max_train_steps={STEPS}", "--checkpointing_steps=1", "--mixed_precision=fp16", "--use_ema"]
    flags += ["--train_batch_size=2", "--lr_scheduler=linear", "--lr_warmup_steps=2", "--resolution=32"]
    outs = {case: jobs.add(case.split()[0], case, *flags, *more) for case, more in OVERFLOWS.items()}
    for (case, out), report in zip(outs.items(), on_device(jobs.list)):
        assert report["status"] == 0, (case, report)
        assert not not_finite(out), case
        states = [json.loads((folder / "state.json").read_text()) for folder in checkpoints(out)]
        overflowed = [state["overflowed_steps"] for state in states]
        assert overflowed[0] == 1 and overflowed[-1] < STEPS, (case, overflowed)
        assert f"skipped={overflowed[-1]}" in report["said"], case
        assert scalars(out, "train/skipped_steps") == overflowed, case
        check_steps(case, out, states)


def checkpoints(out):
    return [out / f"checkpoint-{step + 1}" for step in range(STEPS)]


def check_steps(case, out, states):
    """A step that overflowed halves the scale, and leaves weights, moments, averages and learning rate as they were."""
    for step in range(1, STEPS):
        before, after = states[step - 1], states[step]
        overflowed = after["overflowed_steps"] > before["overflowed_steps"]
        changed = differing(*checkpoints(out)[step - 1 : step + 1])
        assert bool(changed) != overflowed, (case, step + 1, changed)
        assert (after["lr_scheduler"]["last_epoch"] > before["lr_scheduler"]["last_epoch"]) != overflowed, case
        assert (after["ema_updates"] > before["ema_updates"]) != overflowed, case
        assert after["step"] == before["step"] + 1 and after["position"] > before["position"], case
        assert after["scaler"]["scale"] == [before["scaler"]["scale"][0] / (2 if overflowed else 1)], case


@pytest.fixture
def models_that_overflow(jobs, sdxl, sd3, sd, tmp_path):
    """`jobs` on models that compute in float32 as others do, and not in float16: a VAE like SDXL's, whose activations
    pass 65504 before the norm that ends it, and a T5 whose residual stream does."""
    models = {}
    for name, folder in {"sdxl": sdxl, "sd3": sd3, "sd": sd}.items():
        models[name] = shutil.copytree(folder, tmp_path / f"large-{name}")
        multiply(models[name] / "vae", ["decoder.conv_in.weight", "decoder.conv_in.bias"], 1e6)
    multiply(models["sd3"] / "text_encoder_3", ["shared.weight"], 1e7)
    return Jobs({**jobs.models, **models}, jobs.photos, tmp_path)


def multiply(folder, names, factor):
    """Multiply the weights with these names in the file of a model."""
    (file,) = folder.glob("*.safetensors")
    weights = tensors(file)
    assert set(names) <= weights.keys(), sorted(weights)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    save_file(weights | {name: weights[name] * np.float32(factor) for name in names}, file, metadata)


FEW = ("lora_sdxl", "lora_sd3", "lcm_distill_lora_sdxl")
MORE = ("sdxl", "sd3", "sd", "lcm_distill_sd", "lcm_distill_sdxl", "lcm_distill_lora_sd")


@pytest.mark.parametrize("names", [FEW, pytest.param(MORE, marks=pytest.mark.precision)], ids=["few", "more"])
def test_models_that_overflow_in_float16_encode_and_draw_as_in_float32(names, models_that_overflow, on_device):
    jobs = models_that_overflow
    flags = ["--max_train_steps=1", "--train_batch_size=2", "--validation_prompts=a red circle", "--validation_steps=1"]
    flags += ["--validation_inference_steps=2", "--learning_rate=0"]
    precisions = {"float32": [], "fp16": ["--mixed_precision=fp16"]}
    outs = {
        (name, precision): jobs.add(name, f"{name}-{precision}", *flags, *more)
        for name in names
        for precision, more in precisions.items()
    }
    for (case, out), report in zip(outs.items(), on_device(jobs.list)):
        assert report["status"] == 0, (case, report)
        pictures = [
            np.asarray(Image.open(folder / "validation" / "step-1.png").convert("RGB"), dtype="float32")
            for folder in (outs[case[0], "float32"], out)
        ]
        assert pictures[0].std() > 3, "the picture in float32 shows something"
        assert np.abs(pictures[1] - pictures[0]).mean() < 4, (case, pictures[1].std())
        (plain,), (low,) = (scalars(folder) for folder in (outs[case[0], "float32"], out))
        assert abs(low - plain) < 0.01 * plain, case


LATENTS = ("lora_sdxl", "lora_sd3", "decoder_lora")


@pytest.mark.parametrize("names", [LATENTS, pytest.param(MORE, marks=pytest.mark.precision)], ids=["few", "more"])
def test_latents_are_encoded_in_float32_in_every_precision(names, jobs, on_device):
    """So that a cache holds the same latents whatever the precision of the run that filled it."""
    flags = ["--max_train_steps=1", "--max_train_samples=2", "--train_batch_size=2", "--encoded_cache"]
    outs = {
        (name, precision): jobs.add(name, f"{name}-{precision}", *flags, f"--mixed_precision={precision}")
        for name in names
        for precision in ("no", "fp16", "bf16")
    }
    for (case, _), report in zip(outs.items(), on_device(jobs.list)):
        assert report["status"] == 0, (case, report)
    for name in names:
        plain, *low = (latents(outs[name, precision]) for precision in ("no", "fp16", "bf16"))
        assert len(plain) == 2 and plain == low[0] == low[1], name


def latents(out):
    """The bits of all latents in a run's cache."""
    return {arrays["latents"].tobytes() for arrays in encoded_samples(out / "encoded").values()}
