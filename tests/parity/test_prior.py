"""The prior's training step, ours against torch: same weights, images, captions, noise and timesteps."""

import ppdiffusers_train  # noqa: F401

import json

import numpy as np
import paddle
import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from ppdiffusers_train.loop.state import build_training_state
from ppdiffusers_train.runtime.distributed import start_ranks
from tests.conftest import KANDINSKY, PHOTOS, load_script
from tests.parity.common import RecordedDraws, assert_close, in_torch_layout, our_batch, torch_part
from tests.parity.torch_kandinsky import WIDTH, save_decoder, save_prior

BATCH, STEPS = 4, 20
JOB = load_script(KANDINSKY / "train_text_to_image_prior.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prior pipeline written by diffusers."""
    return save_prior(tmp_path_factory.mktemp("prior"))


def our_module(folder, *flags):
    flags = [f"--pretrained_prior_model_name_or_path={folder}", f"--train_data_dir={PHOTOS}", "--seed=0", *flags]
    return JOB.KandinskyPriorTrainingModule(JOB.build_parser().parse_args(flags))


def recorded_draws(seed):
    random = np.random.default_rng(seed)
    return RecordedDraws(
        random.standard_normal((BATCH, WIDTH), dtype=np.float32), random.integers(0, 1000, BATCH, dtype=np.int64)
    )


@torch.no_grad()
def torch_encoded(folder):
    """The reference's encodings of the first photographs and their captions."""
    rows = sorted(
        map(json.loads, (PHOTOS / "metadata.jsonl").read_text().splitlines()), key=lambda row: row["file_name"]
    )
    images = [Image.open(PHOTOS / row["file_name"]).convert("RGB") for row in rows[:BATCH]]
    tokens = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")(
        [row["text"] for row in rows[:BATCH]], max_length=77, padding="max_length", truncation=True, return_tensors="pt"
    )
    text = torch_part(CLIPTextModelWithProjection, folder, "text_encoder")(tokens.input_ids)
    pixels = CLIPImageProcessor.from_pretrained(folder, subfolder="image_processor")(images, return_tensors="pt")
    embeds = torch_part(CLIPVisionModelWithProjection, folder, "image_encoder")(pixels.pixel_values).image_embeds
    return embeds, text.text_embeds, text.last_hidden_state, tokens.attention_mask.bool()


def torch_loss(prior, encoded, draws, gamma):
    """Loss of the reference's script, with min-SNR weights for sample prediction as in the paper."""
    embeds, text_embeds, hidden_states, mask = encoded
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    noise, steps = (torch.from_numpy(draws.recorded[name]) for name in ("noise", "timesteps"))
    target = (embeds - prior.clip_mean.detach()) / prior.clip_std.detach()
    noisy = scheduler.add_noise(target, noise, steps)
    prediction = prior(noisy, steps, text_embeds, hidden_states, mask).predicted_image_embedding
    losses = ((prediction - target) ** 2).mean(dim=1)
    if gamma is not None:
        alpha = scheduler.alphas_cumprod[steps]
        losses = losses * torch.minimum(alpha / (1 - alpha), torch.tensor(gamma))
    return losses.mean()


def learning(prior):
    """A torch prior's parameters without its statistics, which no job trains."""
    return {name: p for name, p in prior.named_parameters() if name not in ("clip_mean", "clip_std")}


def our_learning(module):
    return {name: value for name, value in in_torch_layout(module.prior).items() if not value[0].stop_gradient}


def test_encodings_agree(folder):
    module = our_module(folder)
    encoded = module.encode(our_batch(module, BATCH))
    names = ("image_embeds", "prompt_embeds", "prompt_hidden_states", "text_mask")
    for name, reference in zip(names, torch_encoded(folder)):
        ours, theirs = encoded[name].numpy(), reference.float().numpy()
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), name


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_and_every_gradient_agree(folder, gamma):
    module = our_module(folder, *([f"--snr_gamma={gamma}"] if gamma else []))
    draws = recorded_draws(0)
    loss = module(module.encode(our_batch(module, BATCH)), draws)
    loss.backward()
    prior = torch_part(PriorTransformer, folder, "prior")
    reference = torch_loss(prior, torch_encoded(folder), draws, gamma)
    reference.backward()
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    gradients = {name: (p.grad, transposed) for name, (p, transposed) in our_learning(module).items()}
    assert_close(gradients, {name: p.grad for name, p in learning(prior).items()})


def test_weights_agree_after_twenty_steps_of_adamw(folder):
    # An epsilon above the rounding of gradients that are zero but for it (see the decoder's test).
    module = our_module(
        folder, "--learning_rate=1e-3", "--adam_weight_decay=0.01", "--adam_epsilon=1e-5", "--snr_gamma=5"
    )
    state = build_training_state(module, module.args, STEPS, BATCH, start_ranks())
    encoded, reference = module.encode(our_batch(module, BATCH)), torch_encoded(folder)
    prior = torch_part(PriorTransformer, folder, "prior").train()
    optimizer = torch.optim.AdamW(learning(prior).values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    module.prior.train()
    initial = module.prior.proj_in.weight.numpy()
    for step in range(STEPS):
        loss = module(encoded, recorded_draws(step))
        loss.backward()
        state.take_step(range(step, step + 1), loss.detach())
        torch_loss(prior, reference, recorded_draws(step), 5.0).backward()
        torch.nn.utils.clip_grad_norm_(learning(prior).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert np.abs(module.prior.proj_in.weight.numpy() - initial).max() > 5e-3
    assert_close(our_learning(module), {name: p.detach() for name, p in learning(prior).items()}, 1e-4)


def test_a_prior_saved_for_diffusers_answers_the_same_there(folder, tmp_path):
    """A folder of diffusers, trained on, written for diffusers: the answer is that of the one for ppdiffusers."""
    flags = [f"--pretrained_prior_model_name_or_path={folder}", f"--train_data_dir={PHOTOS}", "--seed=0"]
    for name in ("ppdiffusers", "diffusers"):
        out = f"--output_dir={tmp_path / name}"
        JOB.main([*flags, "--max_train_steps=2", "--report_to=none", f"--save_format={name}", out])
    from diffusers import KandinskyV22PriorPipeline
    from ppdiffusers import DiffusionPipeline

    theirs = KandinskyV22PriorPipeline.from_pretrained(tmp_path / "diffusers")
    ours = DiffusionPipeline.from_pretrained(str(tmp_path / "ppdiffusers"))
    encoded = torch_encoded(folder)
    with torch.no_grad():
        expected = theirs.prior(encoded[0], 7, encoded[1], encoded[2], encoded[3]).predicted_image_embedding.numpy()
    with paddle.no_grad():
        inputs = [paddle.to_tensor(tensor.numpy()) for tensor in encoded]
        answer = ours.prior(inputs[0], 7, inputs[1], inputs[2], inputs[3]).predicted_image_embedding.numpy()
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_combined_pipeline_saved_for_diffusers_draws_there(folder, tmp_path):
    job = load_script(KANDINSKY / "train_text_to_image_decoder.py")
    decoder = save_decoder(tmp_path / "decoder", "epsilon")
    job.main(
        [
            f"--pretrained_prior_model_name_or_path={folder}", f"--pretrained_decoder_model_name_or_path={decoder}",
            f"--train_data_dir={PHOTOS}", "--resolution=64", "--max_train_steps=1", "--report_to=none", "--seed=0",
            "--save_format=diffusers", f"--output_dir={tmp_path / 'out'}",
        ]
    )  # fmt: skip
    from diffusers import KandinskyV22CombinedPipeline

    pipe = KandinskyV22CombinedPipeline.from_pretrained(tmp_path / "out")
    image = pipe("a cat", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
