"""The decoder's training step, ours against torch: same weights, pixels, noise and timesteps.

The torch side uses the models of diffusers and transformers, and a few lines of formula of its own.
"""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, VQModel
from PIL import Image
from ppdiffusers import KandinskyV22CombinedPipeline
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ppdiffusers_train.loop.state import build_training_state
from ppdiffusers_train.runtime.distributed import start_ranks
from tests.conftest import DECODER_SCRIPT, PHOTOS, load_script
from tests.parity.common import RecordedDraws, assert_close, in_torch_layout, our_batch, torch_part
from tests.parity.torch_kandinsky import save_decoder, save_prior

BATCH, RESOLUTION, STEPS = 4, 64, 20
JOB = load_script(DECODER_SCRIPT)


def recorded_draws(seed):
    random = np.random.default_rng(seed)
    return RecordedDraws(
        random.standard_normal((BATCH, 4, 16, 16), dtype=np.float32), random.integers(0, 1000, BATCH, dtype=np.int64)
    )


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folders(request, tmp_path_factory):
    """(prior, decoder, prediction type), written by diffusers."""
    root = tmp_path_factory.mktemp(request.param)
    return save_prior(root / "prior"), save_decoder(root / "decoder", request.param), request.param


def flags_of(folders, *flags):
    return [
        f"--pretrained_prior_model_name_or_path={folders[0]}",
        f"--pretrained_decoder_model_name_or_path={folders[1]}",
        f"--train_data_dir={PHOTOS}",
        f"--resolution={RESOLUTION}",
        "--report_to=none",
        "--seed=0",
        *flags,
    ]


def our_module(folders, *flags):
    args = JOB.build_parser().parse_args(flags_of(folders, *flags))
    return JOB.KandinskyDecoderTrainingModule(args), args


def torch_pixels(folders):
    """The reference's transforms of the first photographs: pixels for MoVQ and for CLIP."""
    images = [Image.open(file).convert("RGB") for file in sorted(PHOTOS.glob("*.jpg"))[:BATCH]]
    pixels = []
    for image in images:
        side = min(image.size)
        box = [(image.width - side) // 2, (image.height - side) // 2]
        square = image.crop((*box, box[0] + side, box[1] + side))
        square = square.resize((RESOLUTION, RESOLUTION), resample=Image.BICUBIC, reducing_gap=1)
        pixels.append(np.array(square).astype(np.float32) / 127.5 - 1)
    processor = CLIPImageProcessor.from_pretrained(folders[0], subfolder="image_processor")
    clip_pixels = processor(images, return_tensors="pt").pixel_values
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()), clip_pixels


@torch.no_grad()
def torch_encoded(folders):
    pixels, clip_pixels = torch_pixels(folders)
    latents = torch_part(VQModel, folders[1], "movq").encode(pixels).latents
    embeds = torch_part(CLIPVisionModelWithProjection, folders[0], "image_encoder")(clip_pixels).image_embeds
    return latents, embeds


def torch_loss(unet, scheduler, encoded, draws, gamma):
    """Loss of the reference's script: diffusers' scheduler, min-SNR weights as in the paper."""
    latents, embeds = encoded
    noise, steps = (torch.from_numpy(draws.recorded[name]) for name in ("noise", "timesteps"))
    noisy = scheduler.add_noise(latents, noise, steps)
    prediction = unet(noisy, steps, None, added_cond_kwargs={"image_embeds": embeds}).sample[:, :4]
    is_epsilon = scheduler.config.prediction_type == "epsilon"
    target = noise if is_epsilon else scheduler.get_velocity(latents, noise, steps)
    losses = ((prediction - target) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        alpha = scheduler.alphas_cumprod[steps]
        snr = alpha / (1 - alpha)
        losses = losses * torch.minimum(snr, torch.tensor(gamma)) / (snr if is_epsilon else snr + 1)
    return losses.mean()


def test_pixels_and_encodings_agree(folders):
    module, args = our_module(folders)
    batch, (pixels, clip_pixels) = our_batch(module, BATCH), torch_pixels(folders)
    assert np.abs(batch["pixel_values"].numpy() - pixels.numpy()).max() < 1e-6
    assert np.abs(batch["clip_pixel_values"].numpy() - clip_pixels.numpy()).max() < 1e-6
    encoded, (latents, embeds) = module.encode(batch), torch_encoded(folders)
    assert np.abs(encoded["latents"].numpy() - latents.numpy()).max() < 1e-5 * latents.abs().max().item()
    assert np.abs(encoded["image_embeds"].numpy() - embeds.numpy()).max() < 1e-5 * embeds.abs().max().item()


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_and_every_gradient_agree(folders, gamma):
    module, args = our_module(folders, *([f"--snr_gamma={gamma}"] if gamma else []))
    draws = recorded_draws(0)
    loss = module(module.encode(our_batch(module, BATCH)), draws)
    loss.backward()
    unet = torch_part(UNet2DConditionModel, folders[1], "unet")
    scheduler = DDPMScheduler.from_pretrained(folders[1], subfolder="scheduler")
    reference = torch_loss(unet, scheduler, torch_encoded(folders), draws, gamma)
    reference.backward()
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    gradients = {name: (p.grad, transposed) for name, (p, transposed) in in_torch_layout(module.unet).items()}
    assert_close(gradients, {name: p.grad for name, p in unet.named_parameters()})


def test_weights_agree_after_twenty_steps_of_adamw(folders):
    # Some gradients are zero but for rounding (a bias on keys shifts every score alike), and AdamW makes full steps of
    # rounding errors; an epsilon above them keeps those weights still, and lets all others move as far as usual.
    flags = ["--learning_rate=1e-3", "--adam_weight_decay=0.01", "--adam_epsilon=1e-5", "--snr_gamma=5"]
    module, args = our_module(folders, *flags)
    state = build_training_state(module, args, STEPS, BATCH, start_ranks())
    encoded = module.encode(our_batch(module, BATCH))
    unet = torch_part(UNet2DConditionModel, folders[1], "unet").train()
    scheduler = DDPMScheduler.from_pretrained(folders[1], subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    reference = torch_encoded(folders)
    module.unet.train()
    initial = module.unet.conv_in.weight.numpy()
    for step in range(STEPS):
        loss = module(encoded, recorded_draws(step))
        loss.backward()
        state.take_step(range(step, step + 1), loss.detach())
        torch_loss(unet, scheduler, reference, recorded_draws(step), 5.0).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert np.abs(module.unet.conv_in.weight.numpy() - initial).max() > 5e-3
    assert_close(in_torch_layout(module.unet), {name: p.detach() for name, p in unet.named_parameters()}, 1e-4)


def test_the_script_turns_diffusers_folders_into_a_pipeline_for_ppdiffusers(folders, tmp_path):
    JOB.main(flags_of(folders, "--max_train_steps=2", "--train_batch_size=2", f"--output_dir={tmp_path}"))
    pipe = KandinskyV22CombinedPipeline.from_pretrained(str(tmp_path))
    image = pipe("a cat", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
    pixels = torch_pixels(folders)[0]
    with torch.no_grad():
        reference = torch_part(VQModel, folders[1], "movq").encode(pixels).latents
    with paddle.no_grad():
        latents = pipe.movq.encode(paddle.to_tensor(pixels.numpy())).latents
    assert np.abs(latents.numpy() - reference.numpy()).max() < 1e-5 * reference.abs().max().item()
