"""SD3's training step, ours against torch: same weights, pixels, noise and timesteps, full and LoRA."""

import ppdiffusers_train  # noqa: F401

import functools

import numpy as np
import paddle
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ppdiffusers_train.cli import main as cli
from ppdiffusers_train.loop.state import build_training_state
from ppdiffusers_train.models.lora import load_lora
from ppdiffusers_train.models.sd3 import SD3Folder
from ppdiffusers_train.objectives.flow_matching import interpolate, shifted_sigmas
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.toy.models.t5 import build_t5_tokenizer
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from tests.conftest import PHOTOS, ROOT, load_script
from tests.parity.common import assert_close, in_torch_layout, our_batch, torch_part, write_pipeline
from tests.parity.test_lora import ALPHA, RANK, share_lora
from tests.parity.test_sdxl import WIDTH, captions_of, text_config, torch_pixels

BATCH, RESOLUTION, STEPS, CHANNELS = 4, 64, 20, 16
JOBS = {name: load_script(ROOT / "examples" / "sd3" / f"train_text_to_image_{name}.py") for name in ("sd3", "lora_sd3")}
LANCZOS = 1
TOLERANCE = 3e-5  # sines of timesteps between whole numbers, up to 1000, differ by 6e-5 in float32


def save_sd3(folder):
    """Write an SD3 pipeline as diffusers does."""
    for name in ("tokenizer", "tokenizer_2"):
        build_tokenizer(folder / name)
    tokens = len(build_t5_tokenizer(folder / "tokenizer_3"))
    t5 = T5Config(
        vocab_size=tokens, d_model=2 * WIDTH, d_kv=WIDTH, d_ff=4 * WIDTH, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=CHANNELS,
        scaling_factor=4.0,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
    )
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config(hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_act="gelu")),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        tokenizer_2=CLIPTokenizer.from_pretrained(str(folder / "tokenizer_2")),
        tokenizer_3=T5Tokenizer.from_pretrained(str(folder / "tokenizer_3"), extra_ids=0, legacy=True),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return write_pipeline(pipeline, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"))


class Draws:
    """Recorded noise and timesteps."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        self.noise = random.standard_normal((BATCH, CHANNELS, 16, 16), dtype=np.float32)
        self.steps = random.integers(0, 1000, BATCH)

    def normal(self, name, shape):
        assert name == "noise" and self.noise.shape[1:] == tuple(shape)
        return paddle.to_tensor(self.noise)

    def categorical(self, name, weights):
        assert name == "timesteps" and len(weights) == 1000
        return paddle.to_tensor(self.steps)


def our_module(name, folder, *flags):
    words = [f"--pretrained_model_name_or_path={folder}", f"--train_data_dir={PHOTOS}", f"--resolution={RESOLUTION}"]
    words += ["--center_crop", "--seed=0", "--report_to=none", *flags]
    module_class = {"sd3": "SD3TrainingModule", "lora_sd3": "SD3LoRATrainingModule"}[name]
    return getattr(JOBS[name], module_class)(JOBS[name].build_parser().parse_args(words))


@functools.cache
@torch.no_grad()
def torch_encoded(folder, captions, t5=True):
    """What diffusers makes of the first photographs: latents, prompt embeddings, pooled embedding."""
    without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pixels, _ = torch_pixels(LANCZOS)
    # One by one: this version compares lengths before it cuts, for all prompts at once.
    parts = [
        pipe.encode_prompt(c, None, None, do_classifier_free_guidance=False, max_sequence_length=77)
        if "max_sequence_length" in pipe.encode_prompt.__code__.co_varnames
        else pipe.encode_prompt(c, None, None, do_classifier_free_guidance=False)
        for c in captions
    ]
    config = pipe.vae.config
    latents = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    return latents, torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def torch_loss(transformer, scheduler, encoded, draws, bell=False):
    """The step of diffusers' SD3 script: sigmas of the scheduler, z_t, the velocity, a weight for each sample."""
    latents, embeds, pooled = encoded
    noise, steps = torch.from_numpy(draws.noise), torch.from_numpy(draws.steps)
    sigmas, timesteps = scheduler.sigmas[steps].reshape(-1, 1, 1, 1), scheduler.timesteps[steps]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    prediction = transformer(noisy, embeds, pooled, timesteps).sample
    losses = ((prediction - (noise - latents)) ** 2).mean(dim=(1, 2, 3))
    if bell:
        curve = torch.exp(-2 * ((scheduler.timesteps - 500) / 1000) ** 2)
        curve = curve - curve.min()
        losses = losses * (curve * (1000 / curve.sum()))[steps]
    return losses.mean()


@pytest.mark.parametrize("t5", [True, False])
def test_pixels_texts_and_latents_agree(folder, t5):
    module = our_module("sd3", folder, *([] if t5 else ["--no_t5"]))
    encoded = module.encode(our_batch(module, BATCH))
    names = ("latents", "prompt_embeds", "pooled_prompt_embeds")
    for name, reference in zip(names, torch_encoded(folder, captions_of(module), t5)):
        assert np.abs(encoded[name].numpy() - reference.numpy()).max() < 1e-5 * reference.abs().max().item(), name


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_table_and_noising_are_those_of_diffusers_scheduler(shift):
    scheduler, sigmas = FlowMatchEulerDiscreteScheduler(shift=shift), shifted_sigmas(1000, shift)
    assert np.abs(scheduler.sigmas.numpy() - sigmas).max() < 1e-7
    sample, noise = (np.random.default_rng(seed).standard_normal((1, 4), dtype=np.float32) for seed in (0, 1))
    for index in (0, 400, 999):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs = scheduler.scale_noise(torch.tensor(sample), scheduler.timesteps[index], torch.tensor(noise))
        ours = interpolate(*map(paddle.to_tensor, (sample, noise, sigmas[index : index + 1])))
        assert np.abs(ours.numpy() - theirs.numpy()).max() < 1e-6


class Side:
    """One job on both sides, with what learns by name."""

    def __init__(self, name, folder, *flags):
        self.module = our_module(name, folder, *flags)
        self.encoded = self.module.encode(our_batch(self.module, BATCH))
        self.reference = torch_encoded(folder, captions_of(self.module))
        self.theirs = torch_part(SD3Transformer2DModel, folder, "transformer")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        if name == "sd3":
            self.torch_parameters = dict(self.theirs.named_parameters())
            ours = in_torch_layout(self.module.transformer)
            # ppdiffusers' norms have biases that diffusers' have not; they do not learn.
            self.ours = {key: ours[key] for key in self.torch_parameters}
            assert all(ours[key][0].stop_gradient for key in ours.keys() - self.ours.keys())
            return
        self.ours, self.torch_parameters = share_lora(self.module.transformer, self.theirs)


LORA = [f"--lora_rank={RANK}", f"--lora_alpha={ALPHA}"]


@pytest.mark.parametrize("name, flags", [("sd3", []), ("lora_sd3", LORA)], ids=["full", "lora"])
@pytest.mark.parametrize("scheme", ["logit-normal", "bell"])
@pytest.mark.parametrize("recompute", [[], ["--gradient_checkpointing"]], ids=["plain", "recompute"])
def test_loss_and_every_gradient_agree(folder, name, flags, scheme, recompute):
    side = Side(name, folder, *flags, f"--weighting_scheme={scheme}", *recompute)
    draws = Draws(0)
    side.module.transformer.train()
    loss = side.module(side.encoded, draws)
    loss.backward()
    reference = torch_loss(side.theirs, side.scheduler, side.reference, draws, scheme == "bell")
    reference.backward()
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    gradients = {key: (parameter.grad, transposed) for key, (parameter, transposed) in side.ours.items()}
    assert_close(gradients, {key: parameter.grad for key, parameter in side.torch_parameters.items()}, TOLERANCE)


@pytest.mark.parametrize("name, flags", [("sd3", []), ("lora_sd3", LORA)], ids=["full", "lora"])
def test_weights_agree_after_twenty_steps_of_adamw(folder, name, flags):
    side = Side(name, folder, *flags, "--learning_rate=1e-3", "--adam_epsilon=1e-5")
    state = build_training_state(side.module, side.module.args, STEPS, BATCH, start_ranks())
    parameters = list(side.torch_parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    side.module.transformer.train()
    for step in range(STEPS):
        loss = side.module(side.encoded, Draws(step))
        loss.backward()
        state.take_step(range(step, step + 1), loss.detach())
        torch_loss(side.theirs, side.scheduler, side.reference, Draws(step)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(side.ours, {key: parameter.detach() for key, parameter in side.torch_parameters.items()}, 1e-4)


def answers(folder, change_theirs, change_ours):
    """What the transformers of both libraries say of the same input, after a change of each."""
    random = np.random.default_rng(0)
    shapes = (1, CHANNELS, 16, 16), (1, 154, 2 * WIDTH), (1, 2 * WIDTH)
    inputs = [*(random.standard_normal(shape, dtype=np.float32) for shape in shapes), np.float32([500.0])]
    theirs = change_theirs()
    ours = change_ours()
    with torch.no_grad(), paddle.no_grad():
        expected = theirs.eval()(*map(torch.from_numpy, inputs)).sample.numpy()
        ours.eval()
        return ours(*map(paddle.to_tensor, inputs)).sample.numpy(), expected


def run(name, folder, output, *flags):
    words = [f"--pretrained_model_name_or_path={folder}", f"--train_data_dir={PHOTOS}", f"--output_dir={output}"]
    words += ["--learning_rate=1e-2", "--max_train_steps=3", "--train_batch_size=2", "--resolution=64", "--seed=0"]
    JOBS[name].main([*words, "--report_to=none", *flags])


def test_a_lora_that_is_converted_draws_the_same_in_diffusers(folder, tmp_path):
    run("lora_sd3", folder, tmp_path / "x", *LORA)
    cli(["convert-lora", str(tmp_path / "x"), "--to", "diffusers", "--output", str(tmp_path / "torch")])
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    base = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    [file] = (tmp_path / "torch").iterdir()

    def change_theirs():
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        return pipe.transformer

    def change_ours():
        transformer = SD3Folder(folder, None, "--folder").load("transformer")
        load_lora(transformer, tmp_path / "x")
        return transformer

    ours, theirs = answers(folder, change_theirs, change_ours)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    unchanged, _ = answers(folder, lambda: base, lambda: SD3Folder(folder, None, "--folder").load("transformer"))
    assert np.abs(unchanged - theirs).max() > 1e-3, "the file changes something"


def test_a_result_written_for_diffusers_is_that_of_ppdiffusers(folder, tmp_path):
    for save_format in ("ppdiffusers", "diffusers"):
        run("sd3", folder, tmp_path / save_format, f"--save_format={save_format}")
    ours, theirs = answers(
        folder,
        lambda: StableDiffusion3Pipeline.from_pretrained(tmp_path / "diffusers").transformer,
        lambda: SD3Folder(tmp_path / "ppdiffusers", None, "--folder").load("transformer"),
    )
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_parts_that_learned_beside_lora_are_written_for_diffusers_too(folder, tmp_path):
    from safetensors.torch import load_file

    flags = [*LORA, "--trainable_modules=proj_out,norm_out.linear"]
    for save_format in ("ppdiffusers", "diffusers"):
        run("lora_sd3", folder, tmp_path / save_format, *flags, f"--save_format={save_format}")

    def change_theirs():
        pipe = StableDiffusion3Pipeline.from_pretrained(folder)
        full = load_file(tmp_path / "diffusers" / "trainable_modules.safetensors")
        full = {name.removeprefix("transformer."): value for name, value in full.items()}
        assert not pipe.transformer.load_state_dict(full, strict=False).unexpected_keys
        pipe.load_lora_weights(str(tmp_path / "diffusers"), weight_name="pytorch_lora_weights.safetensors")
        return pipe.transformer

    def change_ours():
        transformer = SD3Folder(folder, None, "--folder").load("transformer")
        load_lora(transformer, tmp_path / "ppdiffusers")
        return transformer

    ours, theirs = answers(folder, change_theirs, change_ours)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
