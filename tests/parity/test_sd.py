"""Stable Diffusion's training step, ours against torch: same weights, pixels, noise and timesteps, full and LoRA."""

import ppdiffusers_train  # noqa: F401

import functools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_dream_and_update_latents
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from ppdiffusers_train.data.class_images import ClassImages, WithClassImages
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.order import CLASS, SampleOrder
from ppdiffusers_train.draws import Draws as OwnDraws
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from tests.conftest import PHOTOS, ROOT, encode, load_script, module_class, scalars
from tests.parity.common import RecordedDraws, assert_close, in_torch_layout, our_batch, torch_part, write_pipeline
from tests.parity.test_lora import ALPHA, RANK, share_lora
from tests.parity.test_sdxl import BATCH, GAMMA, RESOLUTION, WIDTH, build_scheduler, build_vae, captions_of, text_config
from tests.parity.test_sdxl import torch_pixels as pixels_of_photos

FOLDER = ROOT / "examples" / "stable_diffusion"
JOBS = {name: load_script(FOLDER / f"train_text_to_image{end}.py") for name, end in {"sd": "", "lora": "_lora"}.items()}
LORA = [f"--lora_rank={RANK}", f"--lora_alpha={ALPHA}"]
PERTURBATION, OFFSET, POWER = 0.1, 0.1, 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline as diffusers writes it."""
    folder = tmp_path_factory.mktemp("sd")
    build_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    )
    pipeline = StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=CLIPTextModel(text_config(hidden_act="quick_gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return write_pipeline(pipeline, folder)


class Draws(RecordedDraws):
    """Recorded noise, timesteps, offset and perturbation."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        shape = (BATCH, 4, 16, 16)
        super().__init__(random.standard_normal(shape, dtype=np.float32), random.integers(0, 1000, BATCH))
        self.recorded["noise_offset"] = random.standard_normal((BATCH, 4, 1, 1), dtype=np.float32)
        self.recorded["input_perturbation"] = random.standard_normal(shape, dtype=np.float32)


def our_module(name, folder, *flags):
    words = [f"--pretrained_model_name_or_path={folder}", f"--train_data_dir={PHOTOS}", f"--resolution={RESOLUTION}"]
    words += ["--center_crop", "--seed=0", "--report_to=none", *flags]
    return module_class(JOBS[name])(JOBS[name].build_parser().parse_args(words))


@functools.cache
@torch.no_grad()
def torch_encoded(folder, captions):
    """What diffusers' script makes of the first photographs: latents and prompt embeddings."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pixels, _ = pixels_of_photos(Image.Resampling.LANCZOS)
    embeds, _ = pipe.encode_prompt(list(captions), "cpu", 1, do_classifier_free_guidance=False)
    return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor, embeds


def torch_loss(unet, scheduler, encoded, draws, gamma=None, offset=0.0, perturbation=0.0, dream=None):
    latents, embeds = encoded
    names = ("noise", "timesteps", "noise_offset", "input_perturbation")
    noise, steps, channel, more = (torch.from_numpy(draws.recorded[name]) for name in names)
    noise = noise + offset * channel
    noisy = scheduler.add_noise(latents, noise + perturbation * more, steps)
    is_epsilon = scheduler.config.prediction_type == "epsilon"
    target = noise if is_epsilon else scheduler.get_velocity(latents, noise, steps)
    if dream is not None:
        noisy, target = compute_dream_and_update_latents(unet, scheduler, steps, noise, noisy, target, embeds, dream)
    losses = ((unet(noisy, steps, embeds).sample - target) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        alpha = scheduler.alphas_cumprod[steps]
        snr = alpha / (1 - alpha)
        losses = losses * torch.minimum(snr, torch.tensor(gamma)) / (snr if is_epsilon else snr + 1)
    return losses.mean()


def test_texts_and_latents_agree(folder):
    module = our_module("sd", folder)
    encoded = module.encode(our_batch(module, BATCH))
    for name, reference in zip(("latents", "prompt_embeds"), torch_encoded(folder, captions_of(module))):
        assert np.abs(encoded[name].numpy() - reference.numpy()).max() < 1e-5 * reference.abs().max().item(), name


@pytest.mark.parametrize("name, flags", [("sd", []), ("lora", LORA)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("epsilon", {}),
        ("epsilon", {"gamma": GAMMA, "offset": OFFSET, "perturbation": PERTURBATION, "dream": POWER}),
        ("v_prediction", {"gamma": GAMMA, "offset": OFFSET, "perturbation": PERTURBATION}),
    ],
    ids=["plain", "epsilon", "velocity"],
)
def test_loss_and_every_gradient_agree(folder, name, flags, kind, options):
    names = {"gamma": "snr_gamma", "offset": "noise_offset", "perturbation": "input_perturbation"}
    names["dream"] = "dream_detail_preservation"
    given = [f"--{names[option]}={value}" for option, value in options.items()]
    given += ["--dream_training"] if "dream" in options else []
    module = our_module(name, folder, *flags, *given, f"--prediction_type={kind}")
    theirs = torch_part(UNet2DConditionModel, folder, "unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", prediction_type=kind)
    if name == "sd":
        ours, parameters = in_torch_layout(module.unet), dict(theirs.named_parameters())
    else:
        ours, parameters = share_lora(module.unet, theirs)
    draws = Draws(0)
    loss = module(module.encode(our_batch(module, BATCH)), draws)
    loss.backward()
    reference = torch_loss(theirs, scheduler, torch_encoded(folder, captions_of(module)), draws, **options)
    reference.backward()
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    gradients = {key: (parameter.grad, transposed) for key, (parameter, transposed) in ours.items()}
    assert_close(gradients, {key: parameter.grad for key, parameter in parameters.items()})


def test_a_step_with_class_images_has_diffusers_loss_and_gradient(folder, tmp_path):
    """`train_dreambooth.py` divides one batch of both kinds in the middle."""
    classes, weight = tmp_path / "class", 0.3
    classes.mkdir()
    for number in range(BATCH):
        Image.new("RGB", (70, 70), (60 * number, 99, 0)).save(classes / f"{number}.png")
    flags = [f"--class_data_dir={classes}", "--class_prompt=a thing", f"--num_class_images={BATCH}"]
    flags += [f"--train_batch_size={BATCH}", "--max_train_steps=1", f"--prior_loss_weight={weight}"]
    module, out = our_module("sd", folder, *flags), tmp_path / "out"
    words = [f"--pretrained_model_name_or_path={folder}", f"--train_data_dir={PHOTOS}", f"--output_dir={out}"]
    JOBS["sd"].main([*words, f"--resolution={RESOLUTION}", "--center_crop", "--seed=0", *flags])

    rows = build_dataset(module.args)
    both = WithClassImages(rows, ClassImages(str(classes), [f"{n}.png" for n in range(BATCH)], "a thing"))
    order = SampleOrder(0, len(rows), class_rows=BATCH)
    positions = [*range(BATCH), *(CLASS + number for number in range(BATCH))]
    encoded, draws = encode(module, both, map(order.row, positions)), OwnDraws(0, positions)
    latents, embeds = (torch.from_numpy(encoded[name].numpy()) for name in ("latents", "prompt_embeds"))
    noise = torch.from_numpy(draws.normal("noise", tuple(latents.shape[1:])).numpy())
    steps = torch.from_numpy(draws.integers("timesteps", 0, 1000).numpy())
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = torch_part(UNet2DConditionModel, folder, "unet")
    prediction = unet(scheduler.add_noise(latents, noise, steps), steps, embeds).sample
    (own, prior), (own_noise, prior_noise) = prediction.chunk(2), noise.chunk(2)
    mse = torch.nn.functional.mse_loss
    loss = mse(own, own_noise) + weight * mse(prior, prior_noise)
    loss.backward()
    norm = sum(parameter.grad.square().sum() for parameter in unet.parameters()).sqrt()
    assert scalars(out) == pytest.approx([loss.item()], rel=1e-5)
    assert scalars(out, "train/gradient_norm") == pytest.approx([norm.item()], rel=1e-4)
