"""Latent consistency distillation, ours against torch: formulas, the training step of all four jobs, and its files.

The torch side uses the models of diffusers and transformers, and a few lines of formula of its own.
"""

import ppdiffusers_train  # noqa: F401

import functools
import math

import diffusers
import numpy as np
import paddle
import ppdiffusers
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from ppdiffusers_train.loop.state import build_training_state
from ppdiffusers_train.objectives import consistency
from ppdiffusers_train.objectives.losses import pseudo_huber_loss
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from tests.conftest import PHOTOS, ROOT, load_script, module_class
from tests.parity import test_sdxl
from tests.parity.common import (
    RecordedDraws,
    assert_close,
    in_torch_layout,
    our_batch,
    randomize,
    torch_part,
    write_pipeline,
)
from tests.parity.test_lora import ALPHA, RANK, sd_unet, share_lora

FULL, LORA = ["sd", "sdxl"], ["lora_sd", "lora_sdxl"]
BATCH, RESOLUTION, STEPS, CHANNELS = test_sdxl.BATCH, test_sdxl.RESOLUTION, 3, 256
TRAIN_TIMESTEPS, DDIM_TIMESTEPS, DECAY, HUBER_C, SCALING = 1000, 50, 0.95, 0.001, 10.0
TOLERANCE = 2e-5  # what is divided by small signals is rounded more
JOBS = {name: load_script(ROOT / "examples" / "lcm" / f"train_lcm_distill_{name}_wds.py") for name in FULL + LORA}


# The reference's formulas, in whatever precision their tensors have.


def column(numbers):
    return numbers.view(-1, 1, 1, 1)


def torch_boundary_scalings(times, scaling):
    return 0.25 / ((scaling * times) ** 2 + 0.25), scaling * times / ((scaling * times) ** 2 + 0.25) ** 0.5


def torch_sample_and_noise(prediction_type, alphas_cumprod, output, noisy, times):
    alpha, sigma = column(alphas_cumprod[times] ** 0.5), column((1 - alphas_cumprod[times]) ** 0.5)
    return {
        "epsilon": ((noisy - sigma * output) / alpha, output),
        "v_prediction": (alpha * noisy - sigma * output, alpha * output + sigma * noisy),
        "sample": (output, (noisy - alpha * output) / sigma),
    }[prediction_type]


def torch_ddim_timesteps():
    return torch.arange(1, DDIM_TIMESTEPS + 1) * (TRAIN_TIMESTEPS // DDIM_TIMESTEPS) - 1


def torch_ddim_step(alphas_cumprod, index, sample, noise):
    before = torch.cat([alphas_cumprod[:1], alphas_cumprod[torch_ddim_timesteps()[:-1]]])[index]
    return column(before**0.5) * sample + column((1 - before) ** 0.5) * noise


def torch_guided(conditional, unconditional, guidance):
    return conditional + column(guidance) * (conditional - unconditional)


def torch_guidance_embedding(guidance, channels):
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, dtype=guidance.dtype) * -(math.log(1e4) / (half - 1)))
    angles = (guidance * 1000)[:, None] * frequencies
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def torch_distance(one, other, huber_c=None):
    squares = (one - other) ** 2
    return squares.mean() if huber_c is None else ((squares + huber_c**2) ** 0.5 - huber_c).mean()


# Ours against them: float32 against float64.


SCHEDULE = test_sdxl.build_scheduler().alphas_cumprod
INDICES = torch.arange(DDIM_TIMESTEPS)


def numbers(seed):
    """Normal numbers for every step of the solver: ours, torch's."""
    array = np.random.default_rng(seed).standard_normal((DDIM_TIMESTEPS, 4, 3, 3), dtype=np.float32)
    return paddle.to_tensor(array), torch.from_numpy(array).double()


def to_paddle(tensor):
    return paddle.to_tensor(tensor.numpy())


def assert_agree(ours, reference, tolerance=1e-6):
    assert ours.dtype == paddle.float32
    assert np.abs(ours.numpy() - reference.numpy()).max() < tolerance * reference.abs().max().item()


@pytest.mark.parametrize("scaling", [SCALING, 0.01])
def test_boundary_scalings_agree(scaling):
    times = torch.cat([torch.zeros(1, dtype=torch.int64), torch_ddim_timesteps()])
    ours = consistency.boundary_scalings(to_paddle(times), scaling)
    for one, reference in zip(ours, torch_boundary_scalings(times.double(), scaling)):
        assert one.numpy() == pytest.approx(reference.numpy(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predicted_samples_and_noises_agree(prediction_type):
    (output, torch_output), (noisy, torch_noisy) = numbers(0), numbers(1)
    times = torch_ddim_timesteps()
    ours = consistency.sample_and_noise(prediction_type, to_paddle(SCHEDULE), output, noisy, to_paddle(times))
    theirs = torch_sample_and_noise(prediction_type, SCHEDULE.double(), torch_output, torch_noisy, times)
    for one, reference in zip(ours, theirs):
        assert_agree(one, reference)


def test_steps_of_the_solver_agree():
    steps = consistency.ddim_timesteps(TRAIN_TIMESTEPS, DDIM_TIMESTEPS)
    assert steps.tolist() == torch_ddim_timesteps().tolist()
    (sample, torch_sample), (noise, torch_noise) = numbers(0), numbers(1)
    ours = consistency.ddim_step(to_paddle(SCHEDULE), paddle.to_tensor(steps), to_paddle(INDICES), sample, noise)
    assert_agree(ours, torch_ddim_step(SCHEDULE.double(), INDICES, torch_sample, torch_noise))


def test_guided_predictions_agree():
    (caption, torch_caption), (nothing, torch_nothing) = numbers(0), numbers(1)
    guidance = torch.linspace(0, 15, DDIM_TIMESTEPS)
    ours = consistency.apply_guidance(caption, nothing, to_paddle(guidance))
    assert_agree(ours, torch_guided(torch_caption, torch_nothing, guidance.double()))


def test_guidance_embeddings_agree():
    guidance = torch.tensor([0.0, 0.001, 0.01, 5.0, 7.3, 15.0])
    ours = consistency.guidance_embedding(to_paddle(guidance), CHANNELS).numpy()
    reference = torch_guidance_embedding(guidance.double(), CHANNELS).numpy()
    rounding = 1e-6 + 2.0**-22 * 1000 * guidance.numpy()[:, None]  # of the angles, which go up to 1000 · w
    assert (np.abs(ours - reference) < rounding).all()


def test_huber_losses_agree():
    (one, torch_one), (other, torch_other) = numbers(0), numbers(1)
    for scale in (1e-4, 1.0):  # below and above c
        reference = torch_distance(scale * torch_one, scale * torch_other, HUBER_C).item()
        assert float(pseudo_huber_loss(scale * one, scale * other, HUBER_C)) == pytest.approx(reference, rel=1e-5)


# The whole step.


def save_sd(folder):
    """Write a Stable Diffusion pipeline as diffusers does."""
    build_tokenizer(folder / "tokenizer")
    pipeline = diffusers.StableDiffusionPipeline(
        unet=sd_unet(),
        vae=test_sdxl.build_vae(),
        text_encoder=CLIPTextModel(test_sdxl.text_config(hidden_act="quick_gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        scheduler=test_sdxl.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return write_pipeline(pipeline, folder)


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory):
    """`teacher_of("lora_sdxl", prediction_type)` is the folder of a job's teacher."""

    @functools.cache
    def build(save, prediction_type):
        folder = save(tmp_path_factory.mktemp(save.__name__))
        test_sdxl.build_scheduler(prediction_type).save_pretrained(folder / "scheduler")
        return folder

    def teacher_of(name, prediction_type="epsilon"):
        return build(test_sdxl.save_sdxl if "sdxl" in name else save_sd, prediction_type)

    return teacher_of


@pytest.fixture(scope="module")
def side_of(teacher_of):
    """`side_of("lora_sdxl", prediction_type)` is a `Side` whose weights nobody changes."""
    return functools.cache(lambda name, prediction_type: Side(name, teacher_of(name, prediction_type)))


class Draws(RecordedDraws):
    """Recorded noise, indices into the solver's steps and guidance."""

    timestep_range = (0, DDIM_TIMESTEPS)

    def __init__(self, name, seed):
        random = np.random.default_rng(seed)
        index = random.integers(0, DDIM_TIMESTEPS, BATCH)
        index[:2] = 0, DDIM_TIMESTEPS - 1  # what starts at the first step ends at timestep 0
        super().__init__(random.standard_normal((BATCH, 4, 16, 16), dtype=np.float32), index)
        self.guidance_range = (3.0 if "sdxl" in name else 5.0, 15.0)
        self.recorded["guidance_scale"] = random.uniform(*self.guidance_range, BATCH).astype(np.float32)

    def uniform(self, name, low, high):
        assert (low, high) == self.guidance_range
        return paddle.to_tensor(self.recorded[name])


def our_module(name, folder, *flags):
    words = [f"--pretrained_teacher_model={folder}", f"--train_data_dir={PHOTOS}", f"--resolution={RESOLUTION}"]
    words += ["--center_crop", "--seed=0", "--report_to=none", "--save_format=diffusers", *flags]
    words += [f"--lora_rank={RANK}", f"--lora_alpha={ALPHA}"] if name in LORA else []
    return module_class(JOBS[name])(JOBS[name].build_parser().parse_args(words))


@functools.cache
@torch.no_grad()
def torch_encoded(name, folder, captions):
    """Latents of the first photographs, what the UNets are told of their captions, and what of no caption."""
    if "sdxl" in name:
        latents, *told, time_ids = test_sdxl.torch_encoded(folder, captions, Image.Resampling.BILINEAR)
        caption, nothing = (
            {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
            for embeds, pooled in (told, [torch.zeros_like(tensor) for tensor in told])
        )
        return latents, caption, nothing
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pixels, _ = test_sdxl.torch_pixels(Image.Resampling.BILINEAR)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    caption, nothing = (
        {"encoder_hidden_states": pipe.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)[0]}
        for texts in (list(captions), [""] * BATCH)
    )
    return latents, caption, nothing


class Side:
    """One job on both sides, with what learns by name. Teacher, student and target have weights of their own."""

    def __init__(self, name, folder, *flags):
        self.module = our_module(name, folder, *flags)
        self.reference = latents, caption, _ = torch_encoded(name, folder, test_sdxl.captions_of(self.module))
        names = ("latents", "prompt_embeds", "pooled_prompt_embeds", "time_ids")
        self.encoded = {name: to_paddle(tensor) for name, tensor in zip(names, [latents, *tensors_of(caption)])}
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.teacher = torch_part(diffusers.UNet2DConditionModel, folder, "unet").requires_grad_(False)
        if name in LORA:
            self.student = self.target = torch_part(diffusers.UNet2DConditionModel, folder, "unet")
            self.ours, self.learning = share_lora(self.module.unet, self.student)
            return
        self.student, self.target = (other_unet(self.teacher, seed) for seed in (1, 2))
        copy_weights(self.module.unet, self.student)
        copy_weights(self.module.unet_target, self.target)
        self.ours, self.learning = in_torch_layout(self.module.unet), dict(self.student.named_parameters())

    def torch_loss(self, draws, scaling=SCALING, huber_c=None):
        latents, caption, nothing = self.reference
        noise, index, guidance = (
            torch.from_numpy(draws.recorded[name]) for name in ("noise", "timesteps", "guidance_scale")
        )
        start = torch_ddim_timesteps()[index]
        end = torch.clamp(start - TRAIN_TIMESTEPS // DDIM_TIMESTEPS, min=0)
        noisy, embedding = self.scheduler.add_noise(latents, noise, start), None
        if self.student.config.time_cond_proj_dim:
            # Ours: angles up to 15,000 are rounded to 1e-3. They have a test of their own.
            embedding = torch.from_numpy(consistency.guidance_embedding(to_paddle(guidance), CHANNELS).numpy())

        def answers(unet, noisy, times, **condition):
            kind, output = self.scheduler.config.prediction_type, unet(noisy, times, **condition).sample
            return torch_sample_and_noise(kind, self.scheduler.alphas_cumprod, output, noisy, times)

        def consistent(unet, noisy, times):
            skip, out = map(column, torch_boundary_scalings(times, scaling))
            return skip * noisy + out * answers(unet, noisy, times, timestep_cond=embedding, **caption)[0]

        with torch.no_grad():
            pairs = zip(answers(self.teacher, noisy, start, **caption), answers(self.teacher, noisy, start, **nothing))
            sample, noise = (torch_guided(*pair, guidance) for pair in pairs)
            earlier = torch_ddim_step(self.scheduler.alphas_cumprod, index, sample, noise)
            target = consistent(self.target, earlier, end)
        return torch_distance(consistent(self.student, noisy, start), target, huber_c)


def tensors_of(condition):
    """What a UNet is told, as a list."""
    return [condition["encoder_hidden_states"], *condition.get("added_cond_kwargs", {}).values()]


def other_unet(unet, seed):
    """A UNet of torch that is told its guidance, too, and has other weights."""
    return randomize(diffusers.UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=CHANNELS), seed)


def copy_weights(ours, theirs):
    weights = theirs.state_dict()
    for name, (parameter, transposed) in in_torch_layout(ours).items():
        parameter.set_value(weights[name].numpy().T if transposed else weights[name].numpy())


@pytest.fixture(scope="module")
def fresh_module(teacher_of):
    """`fresh_module(name)` is a job's module before its first step."""
    return functools.cache(lambda name: our_module(name, teacher_of(name)))


@pytest.mark.parametrize("name", FULL + LORA)
def test_defaults_are_the_guides(fresh_module, name):
    args = fresh_module(name).args
    assert (args.num_ddim_timesteps, args.timestep_scaling_factor) == (DDIM_TIMESTEPS, SCALING)
    assert args.huber_c == HUBER_C
    if name in FULL:
        assert (args.ema_decay, args.unet_time_cond_proj_dim) == (DECAY, CHANNELS)


@pytest.mark.parametrize("name", FULL + LORA)
def test_latents_and_what_the_networks_are_told_agree(fresh_module, teacher_of, name):
    module = fresh_module(name)
    encoded = module.encode(our_batch(module, BATCH))
    latents, *conditions = torch_encoded(name, teacher_of(name), test_sdxl.captions_of(module))
    pairs = [(encoded["latents"], latents)]
    for ours, reference in zip(module.conditions(encoded), conditions):
        pairs += zip(tensors_of(ours), tensors_of(reference), strict=True)
    assert len(pairs) == (7 if "sdxl" in name else 3)
    for ours, reference in pairs:
        assert np.abs(ours.numpy() - reference.numpy()).max() <= 1e-5 * reference.abs().max().item()


@pytest.mark.parametrize("name", FULL)
def test_student_and_target_begin_as_the_teacher(fresh_module, teacher_of, name):
    module = fresh_module(name)
    teacher = torch_part(diffusers.UNet2DConditionModel, teacher_of(name), "unet").state_dict()
    teacher["time_embedding.cond_proj.weight"] = torch.from_numpy(module.unet.time_embedding.cond_proj.weight.numpy().T)
    for unet in (module.unet, module.unet_target):
        assert_close(in_torch_layout(unet), teacher, 1e-9)


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
@pytest.mark.parametrize(
    "name, prediction_type", [*((name, "epsilon") for name in FULL + LORA), ("sd", "v_prediction"), ("sd", "sample")]
)
def test_loss_and_every_gradient_agree(side_of, name, prediction_type, loss_type):
    side, draws = side_of(name, prediction_type), Draws(name, 0)
    # From the first step on, c_skip is 0 and c_out is 1 but for rounding, unless the scaling is small; and a huber loss
    # whose c is not far above rounding errors has gradients that depend on them.
    scaling, huber_c = (0.01, 0.5) if loss_type == "huber" else (SCALING, None)
    vars(side.module.args).update(loss_type=loss_type, timestep_scaling_factor=scaling, huber_c=huber_c)
    loss, reference = side.module(side.encoded, draws), side.torch_loss(draws, scaling, huber_c)
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    side.module.clear_gradients()
    loss.backward()
    theirs = torch.autograd.grad(reference, list(side.learning.values()))
    gradients = {key: (parameter.grad, transposed) for key, (parameter, transposed) in side.ours.items()}
    assert_close(gradients, dict(zip(side.learning, theirs)), TOLERANCE)


@pytest.mark.parametrize("name", ["sd", "lora_sdxl"])
def test_student_and_target_agree_after_three_steps_of_adamw(teacher_of, name):
    side = Side(name, teacher_of(name), "--learning_rate=3e-3", "--adam_epsilon=1e-5")
    state = build_training_state(side.module, side.module.args, STEPS, BATCH, start_ranks())
    parameters = list(side.learning.values())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.01)
    for step in range(STEPS):
        loss = side.module(side.encoded, Draws(name, step))
        loss.backward()
        state.take_step(range(step, step + 1), loss.detach())
        side.torch_loss(Draws(name, step)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if name in FULL:
            with torch.no_grad():
                for average, parameter in zip(side.target.parameters(), parameters):
                    average.copy_(DECAY * average + (1 - DECAY) * parameter)
    assert_close(side.ours, {key: parameter.detach() for key, parameter in side.learning.items()}, 1e-4)
    if name in FULL:
        assert_close(in_torch_layout(side.module.unet_target), side.target.state_dict(), 1e-4)


# Files.


def pipeline(library, name, folder, **options):
    """The teacher's pipeline in diffusers or ppdiffusers."""
    kind = "StableDiffusionXLPipeline" if "sdxl" in name else "StableDiffusionPipeline"
    options |= {"add_watermarker": False} if "sdxl" in name else {"safety_checker": None}
    return getattr(library, kind).from_pretrained(str(folder), **options)


@pytest.mark.parametrize("name", LORA)
def test_lora_files_answer_the_same_in_diffusers(side_of, teacher_of, tmp_path, name):
    side = side_of(name, "epsilon")
    side.module.save_pretrained(str(tmp_path))
    latents, caption, _ = side.reference
    times = torch.tensor([19, 299, 499, 999])
    with torch.no_grad(), paddle.no_grad():
        condition, _ = side.module.conditions(side.encoded)
        inputs = side.module.unet, side.encoded["latents"], to_paddle(times)
        ours = side.module.predict_with_student(*inputs, condition, None).numpy()
        base = side.teacher(latents, times, **caption).sample.numpy()
        assert np.abs(ours - base).max() > 1e-2 * np.abs(base).max()
        for file in ("pytorch_lora_weights.safetensors", "lora.safetensors"):
            pipe = pipeline(diffusers, name, teacher_of(name))
            pipe.load_lora_weights(str(tmp_path), weight_name=file)
            answer = pipe.unet(latents, times, **caption).sample.numpy()
            assert np.abs(ours - answer).max() < 1e-5 * np.abs(answer).max(), file


def recorded_noise(to_tensor):
    """Stands in for a scheduler's source of noise."""
    random = np.random.default_rng(1)
    return lambda shape, **options: to_tensor(random.standard_normal(tuple(shape), dtype=np.float32))


@pytest.mark.parametrize("name", FULL)
def test_a_result_for_diffusers_holds_both_networks_and_draws_the_same_there(
    side_of, teacher_of, tmp_path, monkeypatch, name
):
    side = side_of(name, "epsilon")
    side.module.save_pretrained(str(tmp_path))
    for part, expected in (("unet", side.student), ("unet_target", side.target)):
        unet = torch_part(diffusers.UNet2DConditionModel, tmp_path, part)
        assert unet.config.time_cond_proj_dim == CHANNELS
        assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in unet.state_dict().items())
    own = ppdiffusers.UNet2DConditionModel.from_pretrained(str(tmp_path / "unet_target"), from_diffusers=True)
    drawn = []
    for library, to_tensor, options in (
        (diffusers, torch.from_numpy, {"unet": unet}),
        (ppdiffusers, paddle.to_tensor, {"unet": own, "from_diffusers": True}),
    ):
        monkeypatch.setattr(f"{library.__name__}.schedulers.scheduling_lcm.randn_tensor", recorded_noise(to_tensor))
        pipe = pipeline(library, name, teacher_of(name), **options)
        pipe.scheduler = library.LCMScheduler.from_config(pipe.scheduler.config)
        latents = to_tensor(np.random.default_rng(0).standard_normal((1, 4, 16, 16), dtype=np.float32))
        options = {"num_inference_steps": 4, "guidance_scale": 8.0, "height": 64, "width": 64}
        drawn.append(pipe("a cat", latents=latents, output_type="latent", **options).images.numpy())
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-4 * np.abs(drawn[0]).max()
