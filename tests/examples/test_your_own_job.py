"""The eleventh recipe, which examples/README.md explains: Stable Diffusion 1.5, through its script."""

import ppdiffusers_train  # noqa: F401

import ast
import json

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import StableDiffusionPipeline

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import RowDraws
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
from tests.toy_pipelines import build_sd

SCRIPT = ROOT / "examples" / "your_own_job" / "train_text_to_image_sd.py"


@pytest.fixture(scope="module")
def job():
    return load_script(SCRIPT)


@pytest.fixture
def flags(sd, photos):
    return [f"--pretrained_model_name_or_path={sd}", *short_run(photos), "--resolution=32"]


@pytest.fixture
def train(job, flags, tmp_path):
    """`train(*flags, out="out")` runs the script's `main` and returns its output folder."""
    run = runner({"sd": job}, flags, tmp_path)
    return lambda *more, out="out": run("sd", *more, out=out)


@pytest.fixture
def build(job, flags):
    """`build(*flags)` is the script's training module."""
    return lambda *more: builder({"sd": job}, flags)("sd", *more)


def load_pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Given:
    """Draws that were made before."""

    def __init__(self, **values):
        self.values = values

    def normal(self, name, shape=()):
        return paddle.to_tensor(self.values[name])

    def integers(self, name, low, high):
        return paddle.to_tensor(self.values[name])


def mean_loss(module):
    """The loss of two pictures at eight timesteps each, the same for every module."""
    encoded = encode(module, build_dataset(module.args), [0, 1])
    generator = np.random.default_rng(0)
    noise = generator.standard_normal([8, *encoded["latents"].shape], dtype=np.float32)
    module.eval()
    with paddle.no_grad():
        given = [Given(noise=noise[i], timesteps=np.int64([125 * i, 125 * i + 60])) for i in range(8)]
        return np.mean([module(encoded, draws).item() for draws in given])


# What it is.


@pytest.mark.once
def test_it_has_at_most_120_lines_and_stands_on_the_library_alone():
    code = SCRIPT.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 120
    modules = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} == {"ppdiffusers", "ppdiffusers_train"}


@pytest.mark.once
def test_its_flags_mean_what_those_of_the_sdxl_script_mean(job, sdxl_jobs):
    ours, theirs = (
        {action.dest: action for action in script.build_parser()._actions} for script in (job, sdxl_jobs["sdxl"])
    )
    own_defaults = {"resolution": 512, "encoded_cache": None, "output_dir": "sd-model-finetuned"}
    assert ours.keys() <= theirs.keys()
    for name, action in ours.items():
        other = theirs[name]
        for trait in ("option_strings", "type", "choices", "nargs", "required"):
            assert getattr(action, trait) == getattr(other, trait), name
        assert action.default == own_defaults.get(name, other.default), name


# Its inputs.


@pytest.mark.once
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_squared_error_that_a_reader_would_write_down(build, kind, gamma, tmp_path):
    folder = build_sd(tmp_path / "sd", prediction_type=kind)
    module = build(f"--pretrained_model_name_or_path={folder}", *([f"--snr_gamma={gamma}"] if gamma else []))
    encoded = encode(module, build_dataset(module.args), [0, 1])
    timesteps, latents = np.int64([30, 700]), encoded["latents"].numpy()
    noise = np.random.default_rng(0).standard_normal(latents.shape, dtype=np.float32)

    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "scaled_linear"
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]) ** 2
    alpha = np.cumprod(1 - betas)[timesteps].reshape(2, 1, 1, 1)
    noisy = np.sqrt(alpha) * latents + np.sqrt(1 - alpha) * noise
    target = {"epsilon": noise, "v_prediction": np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * latents}[kind]
    with paddle.no_grad():
        answer = module.unet(
            paddle.to_tensor(np.float32(noisy)), paddle.to_tensor(timesteps), encoded["prompt_embeds"]
        ).sample.numpy()
    errors, snr = ((answer - target) ** 2).mean(axis=(1, 2, 3)), (alpha / (1 - alpha)).reshape(2)
    factors = np.minimum(snr, gamma or np.inf) / {"epsilon": snr, "v_prediction": snr + 1}[kind] if gamma else 1
    loss = module(encoded, Given(noise=noise, timesteps=timesteps)).item()
    assert loss == pytest.approx(np.mean(factors * errors), rel=1e-4)


def test_samples_are_encoded_as_the_pipeline_does_it(build, sd, photos):
    module, pipe = build("--center_crop", "--image_interpolation_mode=bicubic"), load_pipeline(sd)
    rows = build_dataset(module.args)
    encoded = encode(module, rows, [0])
    expected, _ = pipe.encode_prompt(rows[0]["caption"], 1, do_classifier_free_guidance=False)
    assert np.array_equal(encoded["prompt_embeds"].numpy(), expected.numpy())
    image = Image.open(next(file for file in photos.glob("*.jpg") if file.name in rows.name(0))).convert("RGB")
    scale = 32 / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
    pixels = np.float32(image.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1)[None] / 127.5 - 1
    with paddle.no_grad():
        latents = pipe.vae.encode(paddle.to_tensor(pixels)).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert np.allclose(encoded["latents"].numpy(), latents.numpy(), atol=1e-5)


@pytest.mark.once
def test_captions_are_dropped_as_often_as_asked_and_become_the_empty_prompt(build):
    module, row = build("--proportion_empty_prompts=0.3"), {"image": Image.new("RGB", (32, 32)), "caption": "a cat"}
    tokens = [module.preprocess(row, RowDraws(0, position))["input_ids"].tolist() for position in range(200)]
    empty = module.preprocess({**row, "caption": ""}, RowDraws(0, 0))["input_ids"].tolist()
    assert 40 < tokens.count(empty) < 80


# What becomes of it.


def test_twelve_steps_on_two_pictures_lower_their_loss_and_change_the_unet_alone(train, build, sd):
    before = mean_loss(build())
    flags = [
        "--max_train_samples=2",
        "--max_train_steps=12",
        "--learning_rate=5e-3",
        "--center_crop",
        "--noise_offset=0.1",
    ]
    out = train(*flags)
    module = build()
    module.load_weights(out)
    assert mean_loss(module) < 0.8 * before
    assert not same(weights(out), weights(sd))
    for part in ("vae/diffusion_paddle_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / part).samefile(sd / part)
    pipe = load_pipeline(out)
    assert same({name: tensor.numpy() for name, tensor in pipe.unet.state_dict().items()}, weights(out))
    assert pipe("a cat", height=32, width=32, num_inference_steps=2).images[0].size == (32, 32)


def test_a_resumed_run_ends_in_the_same_bits(train):
    flags = ["--random_flip", "--use_ema", "--lr_scheduler=linear", "--lr_warmup_steps=1", "--snr_gamma=5"]
    flags += ["--proportion_empty_prompts=0.5", "--checkpointing_steps=2", "--max_train_steps=4"]
    whole = train(*flags, out="whole")
    resumed = train(*flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}", out="resumed")
    assert scalars(whole)[2:] == scalars(resumed)
    assert same(*(optimizer_state(folder / "checkpoint-4") for folder in (whole, resumed)))
    assert same(weights(whole), weights(resumed))


@pytest.mark.once
def test_the_cache_and_validation_pictures_change_no_bit(train):
    plain = train("--center_crop", out="plain")
    flags = ["--encoded_cache", "--validation_prompts", "a cat", "a dog", "--validation_inference_steps=1"]
    other = train("--center_crop", *flags, "--num_validation_images=1", out="other")
    assert len(encoded_samples(other / "encoded")) == 7
    assert Image.open(other / "validation" / "step-2.png").height > 64, "two rows"
    assert scalars(plain) == scalars(other) and same(weights(plain), weights(other))


@pytest.mark.once
def test_a_dry_run_tells_what_learns_and_writes_nothing(train, capsys):
    out = train("--dry_run")
    said = capsys.readouterr().out
    assert "203,204 parameters of UNet2DConditionModel, 203,204 trainable" in said and "fits a GPU with 8 GB" in said
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.once
def test_a_mistake_is_one_line(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("--resolution=66")
    assert stopped.value.code == 2
    assert "--resolution: 66 does not fit this VAE; expected a multiple of 4" in capsys.readouterr().err
