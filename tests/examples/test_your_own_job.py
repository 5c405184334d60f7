"""The job that docs/en/your-own-job.md explains: a VAE's decoder, through its script."""

import ppdiffusers_train  # noqa: F401

import ast

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import StableDiffusionPipeline

from ppdiffusers_train.data.dataset import build_dataset
from tests.conftest import (
    ROOT,
    builder,
    encode,
    encoded_samples,
    load_script,
    optimizer_state,
    runner,
    same,
    scalars,
    short_run,
    weights,
)

SCRIPT = ROOT / "examples" / "your_own_job" / "train_vae_decoder.py"


@pytest.fixture(scope="module")
def job():
    return load_script(SCRIPT)


@pytest.fixture
def flags(sd, photos):
    return [f"--pretrained_model_name_or_path={sd}", *short_run(photos), "--resolution=32"]


@pytest.fixture
def train(job, flags, tmp_path):
    """`train(*flags, out="out")` runs the script's `main` and returns its output folder."""
    run = runner({"vae": job}, flags, tmp_path)
    return lambda *more, out="out": run("vae", *more, out=out)


@pytest.fixture
def build(job, flags):
    """`build(*flags)` is the script's training module."""
    return lambda *more: builder({"vae": job}, flags)("vae", *more)


class Given:
    """Draws that were made before."""

    def __init__(self, **values):
        self.values = values

    def normal(self, name, shape=()):
        return paddle.to_tensor(self.values[name])


@pytest.mark.once
def test_it_has_at_most_80_lines_and_stands_on_the_library_alone():
    code = SCRIPT.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 80
    modules = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} == {"ppdiffusers_train"}


def test_the_loss_is_the_squared_error_of_what_the_library_s_vae_restores(build, sd):
    module, pipe = build(), StableDiffusionPipeline.from_pretrained(str(sd))
    encoded = encode(module, build_dataset(module.args), [0, 1])
    with paddle.no_grad():
        latents = pipe.vae.encode(encoded["pixel_values"]).latent_dist
        noise = np.random.default_rng(0).standard_normal(latents.mean.shape, dtype=np.float32)
        restored = pipe.vae.decode(latents.mean + latents.std * paddle.to_tensor(noise)).sample
        errors = (restored - encoded["pixel_values"]).square()
        assert module(encoded, Given(latents=noise)).item() == pytest.approx(errors.mean().item(), rel=1e-5)
    assert latents.std.min() > 0 and np.abs(encoded["pixel_values"].numpy()).max() <= 1


def test_twelve_steps_lower_the_loss_and_change_the_decoder_alone(train, sd):
    out = train("--max_train_samples=2", "--max_train_steps=12", "--learning_rate=1e-2", "--center_crop")
    losses, before, after = scalars(out), weights(sd, "vae"), weights(out, "vae")
    assert losses[-1] < 0.7 * losses[0]
    changed = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert (out / "unet/diffusion_paddle_model.safetensors").samefile(sd / "unet/diffusion_paddle_model.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(str(out))
    assert pipe("a cat", height=32, width=32, num_inference_steps=2).images[0].size == (32, 32)


def test_a_resumed_run_ends_in_the_same_bits(train):
    flags = ["--random_flip", "--use_ema", "--checkpointing_steps=2", "--max_train_steps=4"]
    whole = train(*flags, out="whole")
    resumed = train(*flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}", out="resumed")
    assert scalars(whole)[2:] == scalars(resumed)
    assert same(*(optimizer_state(folder / "checkpoint-4") for folder in (whole, resumed)))
    assert same(weights(whole, "vae"), weights(resumed, "vae"))


@pytest.mark.once
def test_the_cache_and_validation_pictures_change_no_bit(train):
    plain = train("--center_crop", out="plain")
    flags = ["--encoded_cache", "--validation_prompts", "a cat", "a dog", "--validation_inference_steps=1"]
    other = train("--center_crop", *flags, "--num_validation_images=1", out="other")
    assert len(encoded_samples(other / "encoded")) == 7
    assert Image.open(other / "validation" / "step-2.png").height > 64, "two rows"
    assert scalars(plain) == scalars(other) and same(weights(plain, "vae"), weights(other, "vae"))


@pytest.mark.once
def test_a_dry_run_tells_what_learns_and_writes_nothing(train, capsys):
    out = train("--dry_run")
    said = capsys.readouterr().out
    assert "62,463 parameters of AutoencoderKL, 37,959 trainable" in said and "fits a GPU with 8 GB" in said
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.once
def test_a_mistake_is_one_line(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("--resolution=66")
    assert stopped.value.code == 2
    assert "--resolution: 66 does not fit this VAE; expected a multiple of 4" in capsys.readouterr().err
