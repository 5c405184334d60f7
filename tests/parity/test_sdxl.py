"""SDXL's training step, ours against torch: same weights, pixels, noise and timesteps, full and LoRA."""

import ppdiffusers_train  # noqa: F401

import functools

import numpy as np
import paddle
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ppdiffusers_train.loop.state import build_training_state
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from tests.conftest import PHOTOS, ROOT, load_script
from tests.parity.common import RecordedDraws, assert_close, in_torch_layout, our_batch, torch_part, write_pipeline
from tests.parity.test_lora import ALPHA, RANK, share_lora

BATCH, RESOLUTION, STEPS, WIDTH, GAMMA = 4, 64, 20, 32, 5.0
JOBS = {
    name: load_script(ROOT / "examples" / "sdxl" / f"train_text_to_image_{name}.py") for name in ("sdxl", "lora_sdxl")
}


def text_config(**options):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"vocab_size": 514, "max_position_embeddings": 77, "projection_dim": WIDTH, "eos_token_id": 512}
    return CLIPTextConfig(**sizes, **options)


def build_vae():
    """A VAE whose scaled latents have a deviation near 1, as the published one's."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=4.0,
    )


def build_scheduler(prediction_type="epsilon"):
    options = {"beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": prediction_type}
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, **options)


def save_sdxl(folder):
    """Write an SDXL pipeline as diffusers does."""
    for name in ("tokenizer", "tokenizer_2"):
        build_tokenizer(folder / name)
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 48,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=CLIPTextModel(text_config(hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_act="gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        tokenizer_2=CLIPTokenizer.from_pretrained(str(folder / "tokenizer_2")),
        unet=unet,
        scheduler=build_scheduler(),
    )
    return write_pipeline(pipeline, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sdxl(tmp_path_factory.mktemp("sdxl"))


class Draws(RecordedDraws):
    """Recorded noise, timesteps and offset."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        super().__init__(random.standard_normal((BATCH, 4, 16, 16), dtype=np.float32), random.integers(0, 1000, BATCH))
        self.recorded["noise_offset"] = random.standard_normal((BATCH, 4, 1, 1), dtype=np.float32)


def our_module(name, folder, *flags):
    words = [f"--pretrained_model_name_or_path={folder}", f"--train_data_dir={PHOTOS}", f"--resolution={RESOLUTION}"]
    words += ["--center_crop", "--seed=0", "--report_to=none", *flags]
    module_class = {"sdxl": "SDXLTrainingModule", "lora_sdxl": "SDXLLoRATrainingModule"}[name]
    return getattr(JOBS[name], module_class)(JOBS[name].build_parser().parse_args(words))


def torch_pixels(resample):
    """The first photographs as diffusers' scripts take them: pixels, [((height, width), (top, left) of the crop)]."""
    pixels, origins = [], []
    for file in sorted(PHOTOS.glob("*.jpg"))[:BATCH]:
        image = Image.open(file).convert("RGB")
        size = (image.height, image.width)
        scale = RESOLUTION / min(image.size)
        image = image.resize([int(scale * side) for side in image.size], resample)
        top = max(0, int(round((image.height - RESOLUTION) / 2.0)))
        left = max(0, int(round((image.width - RESOLUTION) / 2.0)))
        image = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
        pixels.append((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.5)
        origins.append((size, (top, left)))
    return torch.stack(pixels), origins


@functools.cache
@torch.no_grad()
def torch_encoded(folder, captions, resample=Image.Resampling.LANCZOS):
    """What diffusers' script makes of the first photographs: latents, prompt embeddings, pooled embedding, time ids."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pixels, origins = torch_pixels(resample)
    options = {"dtype": torch.float32, "text_encoder_projection_dim": WIDTH}
    time_ids = [pipe._get_add_time_ids(*origin, (RESOLUTION, RESOLUTION), **options) for origin in origins]
    embeds, _, pooled, _ = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    return latents, embeds, pooled, torch.cat(time_ids)


def captions_of(module):
    from ppdiffusers_train.data.dataset import build_dataset

    rows = build_dataset(module.args)
    return tuple(rows[index]["caption"] for index in range(BATCH))


def torch_loss(unet, scheduler, encoded, draws, prediction_type, gamma, offset):
    latents, embeds, pooled, time_ids = encoded
    noise, steps, channel = (torch.from_numpy(draws.recorded[n]) for n in ("noise", "timesteps", "noise_offset"))
    noise = noise + offset * channel
    noisy = scheduler.add_noise(latents, noise, steps)
    prediction = unet(noisy, steps, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample
    velocity = scheduler.get_velocity(latents, noise, steps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    losses = ((prediction - target) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        alpha = scheduler.alphas_cumprod[steps]
        snr = alpha / (1 - alpha)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        losses = losses * torch.minimum(snr, torch.tensor(gamma)) / divisor
    return losses.mean()


def test_pixels_texts_sizes_and_latents_agree(folder):
    module = our_module("sdxl", folder)
    encoded = module.encode(our_batch(module, BATCH))
    names = ("latents", "prompt_embeds", "pooled_prompt_embeds", "time_ids")
    for name, reference in zip(names, torch_encoded(folder, captions_of(module))):
        assert np.abs(encoded[name].numpy() - reference.numpy()).max() < 1e-5 * reference.abs().max().item(), name


class Side:
    """One job on both sides, with what learns by name."""

    def __init__(self, name, folder, *flags):
        self.module = our_module(name, folder, *flags)
        self.encoded = self.module.encode(our_batch(self.module, BATCH))
        self.reference = torch_encoded(folder, captions_of(self.module))
        self.theirs = torch_part(UNet2DConditionModel, folder, "unet")
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        if name == "sdxl":
            self.ours = in_torch_layout(self.module.unet)
            self.torch_parameters = dict(self.theirs.named_parameters())
            return
        self.ours, self.torch_parameters = share_lora(self.module.unet, self.theirs)


LORA = [f"--lora_rank={RANK}", f"--lora_alpha={ALPHA}"]


@pytest.mark.parametrize("name, flags", [("sdxl", []), ("lora_sdxl", LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("gamma, offset", [(None, 0.0), (GAMMA, 0.1)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_and_every_gradient_agree(folder, name, flags, gamma, offset, prediction_type):
    flags = [*flags, f"--prediction_type={prediction_type}", f"--noise_offset={offset}"]
    side = Side(name, folder, *flags, *([f"--snr_gamma={gamma}"] if gamma else []))
    draws = Draws(0)
    loss = side.module(side.encoded, draws)
    loss.backward()
    reference = torch_loss(side.theirs, side.scheduler, side.reference, draws, prediction_type, gamma, offset)
    reference.backward()
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    gradients = {key: (parameter.grad, transposed) for key, (parameter, transposed) in side.ours.items()}
    assert_close(gradients, {key: parameter.grad for key, parameter in side.torch_parameters.items()})


def test_every_gradient_of_text_encoders_agrees(folder):
    side, draws = Side("lora_sdxl", folder, *LORA, "--train_text_encoder"), Draws(0)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    for part in ("text_encoder", "text_encoder_2"):
        ours, theirs = share_lora(getattr(side.module, part), getattr(pipe, part))
        side.ours |= {f"{part}.{key}": value for key, value in ours.items()}
        side.torch_parameters |= {f"{part}.{key}": value for key, value in theirs.items()}
    side.module(side.encoded, draws).backward()
    embeds, _, pooled, _ = pipe.encode_prompt(list(captions_of(side.module)), do_classifier_free_guidance=False)
    reference = side.reference[0], embeds, pooled, side.reference[3]
    torch_loss(side.theirs, side.scheduler, reference, draws, "epsilon", None, 0.0).backward()
    gradients = {key: (p.grad, transposed) for key, (p, transposed) in side.ours.items() if p.grad is not None}
    assert any("layers.0" in key for key in gradients)
    assert_close(gradients, {key: p.grad for key, p in side.torch_parameters.items() if p.grad is not None})


@pytest.mark.parametrize("name, flags", [("sdxl", []), ("lora_sdxl", LORA)], ids=["full", "lora"])
def test_weights_agree_after_twenty_steps_of_adamw(folder, name, flags):
    flags = [*flags, "--learning_rate=1e-3", "--adam_epsilon=1e-5", f"--snr_gamma={GAMMA}", "--noise_offset=0.1"]
    side = Side(name, folder, *flags)
    state = build_training_state(side.module, side.module.args, STEPS, BATCH, start_ranks())
    parameters = list(side.torch_parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    side.module.unet.train()
    for step in range(STEPS):
        loss = side.module(side.encoded, Draws(step))
        loss.backward()
        state.take_step(range(step, step + 1), loss.detach())
        torch_loss(side.theirs, side.scheduler, side.reference, Draws(step), "epsilon", GAMMA, 0.1).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(side.ours, {key: parameter.detach() for key, parameter in side.torch_parameters.items()}, 1e-4)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_loras_of_unet_and_text_encoders_draw_the_same_in_diffusers(folder, tmp_path, file_format):
    from ppdiffusers import StableDiffusionXLPipeline as PaddlePipeline

    from ppdiffusers_train.cli import main as cli
    from ppdiffusers_train.models.lora import allow_text_encoder_lora

    flags = ["--train_text_encoder", *LORA, "--learning_rate=1e-2", "--max_train_steps=3", "--train_batch_size=2"]
    words = [
        f"--pretrained_model_name_or_path={folder}",
        f"--train_data_dir={PHOTOS}",
        f"--output_dir={tmp_path / 'x'}",
    ]
    JOBS["lora_sdxl"].main([*words, *flags, "--resolution=64", "--seed=0", "--report_to=none"])
    cli(["convert-lora", str(tmp_path / "x"), "--to", file_format, "--output", str(tmp_path / "torch")])
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype("float32")
    theirs = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    base = theirs.encode_prompt("a cat", do_classifier_free_guidance=False)[2]
    [file] = (tmp_path / "torch").iterdir()
    theirs.load_lora_weights(str(file.parent), weight_name=file.name)
    allow_text_encoder_lora()
    ours = PaddlePipeline.from_pretrained(str(folder), from_diffusers=True, add_watermarker=False)
    ours.load_lora_weights(str(tmp_path / "x"))
    with torch.no_grad(), paddle.no_grad():
        embeds, _, pooled, _ = theirs.encode_prompt("a cat", do_classifier_free_guidance=False)
        our_embeds, _, our_pooled, _ = ours.encode_prompt("a cat", do_classifier_free_guidance=False)
        condition = {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}
        answer = theirs.unet(torch.tensor(latents), 7, embeds, added_cond_kwargs=condition).sample.numpy()
        condition = {"text_embeds": our_pooled, "time_ids": paddle.ones([1, 6])}
        our_answer = ours.unet(paddle.to_tensor(latents), 7, our_embeds, added_cond_kwargs=condition).sample.numpy()
    for one, other in ((our_embeds, embeds), (our_pooled, pooled), (our_answer, answer)):
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()
    assert np.abs(base.detach().numpy() - pooled.numpy()).max() > 1e-3, "the file changes something"
