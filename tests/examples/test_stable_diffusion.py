"""Stable Diffusion's scripts, in full and with LoRA: what is their own."""

import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import StableDiffusionPipeline

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import RowDraws
from tests.conftest import (
    LEVERS,
    OF_LATENTS,
    encode,
    encoded_samples,
    first_losses,
    last_error,
    optimizer_state,
    same,
    scalars,
    tensors,
    weights,
)
from tests.toy_pipelines import build_sd

LORA_FILE = "paddle_lora_weights.safetensors"


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


@pytest.mark.once
def test_their_flags_mean_what_those_of_the_sdxl_scripts_mean(sd_jobs, sdxl_jobs):
    for ours, theirs in (("sd", "sdxl"), ("lora_sd", "lora_sdxl")):
        own = {action.dest: action for action in sd_jobs[ours].build_parser()._actions}
        other = {action.dest: action for action in sdxl_jobs[theirs].build_parser()._actions}
        assert own.keys() - other.keys() == {"dream_training", "dream_detail_preservation"}
        for name in own.keys() & other.keys():
            for trait in ("option_strings", "type", "choices", "nargs", "required"):
                assert getattr(own[name], trait) == getattr(other[name], trait), name


# The loss.


@pytest.mark.once
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma, strength", [(None, 0.0), (5.0, 0.1)])
def test_the_loss_is_the_squared_error_that_a_reader_would_write_down(build_sd_module, kind, gamma, strength, tmp_path):
    folder = build_sd(tmp_path / "sd", prediction_type=kind)
    flags = [f"--pretrained_model_name_or_path={folder}", f"--input_perturbation={strength}"]
    module = build_sd_module("sd", *flags, *([f"--snr_gamma={gamma}"] if gamma else []))
    encoded = encode(module, build_dataset(module.args), [0, 1])
    timesteps, latents = np.int64([30, 700]), encoded["latents"].numpy()
    noise, more = np.random.default_rng(0).standard_normal([2, *latents.shape], dtype=np.float32)

    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "scaled_linear"
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"]) ** 2
    alpha = np.cumprod(1 - betas)[timesteps].reshape(2, 1, 1, 1)
    noisy = np.sqrt(alpha) * latents + np.sqrt(1 - alpha) * (noise + strength * more)
    target = {"epsilon": noise, "v_prediction": np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * latents}[kind]
    with paddle.no_grad():
        answer = module.unet(
            paddle.to_tensor(np.float32(noisy)), paddle.to_tensor(timesteps), encoded["prompt_embeds"]
        ).sample.numpy()
    errors, snr = ((answer - target) ** 2).mean(axis=(1, 2, 3)), (alpha / (1 - alpha)).reshape(2)
    factors = np.minimum(snr, gamma or np.inf) / {"epsilon": snr, "v_prediction": snr + 1}[kind] if gamma else 1
    loss = module(encoded, Given(noise=noise, timesteps=timesteps, input_perturbation=more)).item()
    assert loss == pytest.approx(np.mean(factors * errors), rel=1e-4)


@pytest.mark.once
def test_dream_training_needs_a_model_that_predicts_the_noise(train_sd, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_sd("sd", "--dream_training", "--prediction_type=v_prediction")
    assert stopped.value.code == 2
    assert "--dream_training: this model predicts v_prediction; expected one that predicts epsilon" in last_error(
        capsys
    )


@pytest.mark.once
def test_each_flag_of_the_loss_changes_it(build_sd_module):
    kind = "--prediction_type=v_prediction"
    of_velocity = [[kind, *flags] for flags in ([], ["--scale_v_pred_loss_like_noise_pred"], ["--debiased_loss"])]
    of_velocity += [[kind, "--rescale_betas_zero_snr"], [kind, "--snr_gamma=1"]]
    dream = [["--dream_training"], ["--dream_training", "--dream_detail_preservation=3"]]
    flags = [[], *LEVERS, *OF_LATENTS, *of_velocity, *dream, ["--prediction_type=sample"]]
    losses = first_losses(lambda *flags: build_sd_module("sd", *flags), *flags)
    assert len({*losses}) == len(flags), dict(zip(map(str, flags), losses))


@pytest.mark.once
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rescale_betas_zero_snr"], "--rescale_betas_zero_snr: this model predicts epsilon"),
        (["--scale_v_pred_loss_like_noise_pred"], "--scale_v_pred_loss_like_noise_pred: this model predicts epsilon"),
        (
            ["--prediction_type=v_prediction", "--scale_v_pred_loss_like_noise_pred", "--snr_gamma=5"],
            "--scale_v_pred_loss_like_noise_pred: both this flag and --snr_gamma weight the loss",
        ),
        (["--debiased_loss", "--snr_gamma=5"], "--debiased_loss: both this flag and --snr_gamma weight the loss"),
        (["--huber_c=0.1"], "--huber_c: --loss_type is l2, which has no threshold; expected huber or smooth_l1"),
        (["--huber_schedule=snr"], "--huber_schedule: --loss_type is l2"),
        (["--multires_noise_iterations=3"], "--multires_noise_iterations: --multires_noise_discount is 0"),
    ],
)
def test_flags_that_exclude_each_other_are_refused_in_one_line(train_sd, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        train_sd("sd", *flags)
    assert stopped.value.code == 2 and message in last_error(capsys)


@pytest.mark.once
def test_zero_terminal_snr_is_trained_and_stands_in_the_result(train_sd, build_sd_module, sd, tmp_path):
    base = shutil.copytree(sd, tmp_path / "base")
    for file in (base / "model_index.json", base / "scheduler" / "scheduler_config.json"):
        text = file.read_text()
        file.unlink()
        file.write_text(text.replace("DDPMScheduler", "EulerDiscreteScheduler"))  # which cannot do it
    flags = [f"--pretrained_model_name_or_path={base}", "--rescale_betas_zero_snr", "--prediction_type=v_prediction"]
    schedule = build_sd_module("sd", *flags).scheduler.alphas_cumprod.numpy()
    roots = np.sqrt(build_sd_module("sd").scheduler.alphas_cumprod.numpy())
    expected = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    assert schedule[-1] == 0 and np.allclose(schedule, expected, atol=1e-5)
    out = train_sd("sd", *flags, "--validation_prompts", "a cat", "--validation_inference_steps=1")
    pipe = load_pipeline(out)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and pipe.scheduler.alphas_cumprod[-1] == 0
    config = pipe.scheduler.config
    assert config.rescale_betas_zero_snr and not config.clip_sample and config.beta_start == 0.00085
    assert (config.timestep_spacing, config.prediction_type) == ("trailing", "v_prediction")
    image = pipe("a cat", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert np.isfinite(image).all()


# The inputs.


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_samples_are_encoded_as_the_pipeline_does_it(build_sd_module, sd, photos, clip_skip):
    flags = ["--center_crop", "--image_interpolation_mode=bicubic", f"--clip_skip={clip_skip}"]
    module = build_sd_module("sd", *flags)
    pipe, rows = load_pipeline(sd), build_dataset(module.args)
    encoded = encode(module, rows, [0])
    skipping = {"clip_skip": clip_skip} if clip_skip else {}
    expected, _ = pipe.encode_prompt(rows[0]["caption"], 1, do_classifier_free_guidance=False, **skipping)
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
def test_captions_are_dropped_as_often_as_asked_and_become_the_empty_prompt(build_sd_module):
    module = build_sd_module("sd", "--proportion_empty_prompts=0.3")
    row = {"image": Image.new("RGB", (32, 32)), "caption": "a cat"}
    tokens = [module.preprocess(row, RowDraws(0, position))["input_ids"].tolist() for position in range(200)]
    empty = module.preprocess({**row, "caption": ""}, RowDraws(0, 0))["input_ids"].tolist()
    assert 40 < tokens.count(empty) < 80


# The results.


def test_twelve_steps_on_two_pictures_lower_their_loss_and_change_the_unet_alone(train_sd, build_sd_module, sd):
    flags = ["--max_train_samples=2", "--max_train_steps=12", "--learning_rate=5e-3"]
    out = train_sd("sd", *flags, "--center_crop", "--noise_offset=0.1", "--prediction_type=v_prediction")
    module = build_sd_module("sd", "--prediction_type=v_prediction")
    untrained = mean_loss(module)
    module.load_weights(out)
    assert mean_loss(module) < 0.8 * untrained
    for part in ("vae/diffusion_paddle_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / part).samefile(sd / part)
    pipe = load_pipeline(out)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert same({name: tensor.numpy() for name, tensor in pipe.unet.state_dict().items()}, weights(out))
    assert pipe("a cat", height=32, width=32, num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("name", ["sd", "lora_sd"])
def test_a_resumed_run_ends_in_the_same_bits(train_sd, name):
    flags = ["--random_flip", "--use_ema", "--lr_scheduler=linear", "--lr_warmup_steps=1", "--snr_gamma=5"]
    flags += ["--proportion_empty_prompts=0.5", "--checkpointing_steps=2", "--max_train_steps=4"]
    flags += ["--train_text_encoder"] if name == "lora_sd" else ["--dream_training"]
    whole = train_sd(name, *flags, out="whole")
    resumed = train_sd(name, *flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}", out="resumed")
    assert scalars(whole)[2:] == scalars(resumed)
    assert same(*(optimizer_state(folder / "checkpoint-4") for folder in (whole, resumed)))
    file = LORA_FILE if name == "lora_sd" else "unet/diffusion_paddle_model.safetensors"
    assert same(tensors(whole / file), tensors(resumed / file))


@pytest.mark.once
def test_a_base_whose_scheduler_has_changed_is_refused_at_a_resume(train_sd, sd, tmp_path, capsys):
    base = shutil.copytree(sd, tmp_path / "base")
    flags = [f"--pretrained_model_name_or_path={base}", "--resume_from_checkpoint=latest"]
    train_sd("lora_sd", *flags, "--max_train_steps=1")
    file = base / "scheduler" / "scheduler_config.json"
    before = file.read_text()
    for change in ({"prediction_type": "v_prediction"}, {"beta_end": 0.02}):
        file.unlink()  # it may be a hard link
        file.write_text(json.dumps({**json.loads(before), **change}))
        with pytest.raises(SystemExit) as stopped:
            train_sd("lora_sd", *flags, "--max_train_steps=2")
        message = "was trained from other settings of scheduler; expected the same ones, or a new run"
        assert stopped.value.code == 2 and message in last_error(capsys)
    file.write_text(before)
    train_sd("lora_sd", *flags, "--max_train_steps=2", "--prediction_type=epsilon")


@pytest.mark.once
def test_the_cache_and_validation_pictures_change_no_bit(train_sd):
    plain = train_sd("sd", "--center_crop", out="plain")
    flags = ["--encoded_cache", "--validation_prompts", "a cat", "a dog", "--validation_inference_steps=1"]
    other = train_sd("sd", "--center_crop", *flags, "--num_validation_images=1", out="other")
    assert len(encoded_samples(other / "encoded")) == 7
    assert Image.open(other / "validation" / "step-2.png").height > 64, "two rows"
    assert scalars(plain) == scalars(other) and same(weights(plain), weights(other))


@pytest.mark.once
def test_a_lora_of_unet_and_text_encoder_is_loaded_by_the_pipeline(train_sd, build_sd_module, sd):
    flags = ["--train_text_encoder", "--lora_alpha=8", "--learning_rate=1e-2"]
    out = train_sd("lora_sd", *flags, "--max_train_steps=3", "--checkpointing_steps=3")
    module, pipe = build_sd_module("lora_sd", *flags), load_pipeline(sd)
    module.load_weights(str(out / "checkpoint-3"))
    module.eval()
    sample, timestep = paddle.ones([1, 4, 16, 16]), paddle.to_tensor([7])

    def answers(unet, text_encoder):
        with paddle.no_grad():
            embeds = text_encoder(paddle.arange(77).unsqueeze(0))[0]
            return embeds.numpy(), unet(sample, timestep, embeds).sample.numpy()

    trained, base = answers(module.unet, module.text_encoder), answers(pipe.unet, pipe.text_encoder)
    from ppdiffusers_train.models.lora import allow_text_encoder_lora

    allow_text_encoder_lora()
    pipe.load_lora_weights(str(out))
    for one, other, before in zip(answers(pipe.unet, pipe.text_encoder), trained, base):
        change = np.abs(other - before).max()
        assert change > 1e-3 and np.abs(one - other).max() < 1e-4 * change
