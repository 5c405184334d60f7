"""What training feeds a model is what the model's own pipeline feeds it, for every job.

ppdiffusers' pipelines are the judges. Each draws at the timesteps that its own scheduler visits, from the noisy sample
that a training step fed the model there; its last step ends in what that training step had put noise on.
"""

import ppdiffusers_train  # noqa: F401

import inspect
import json
import shutil
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from typing import NamedTuple

import numpy as np
import paddle
import ppdiffusers
import pytest
from PIL import Image
from ppdiffusers.image_processor import VaeImageProcessor
from safetensors.numpy import save_file

from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.module import encode_batch
from ppdiffusers_train.toy.models.sd3 import build_scheduler
from tests.conftest import PHOTOS, ROOT, load_script, module_class, short_run, weights

STEPS, SCALE = 3, 7.5
# An image that is cropped and not scaled: its crop is known to the pixel.
WIDTH, SIDE, LEFT = 50, 32, 9
IMAGE = Image.open(PHOTOS / "chelsea.jpg").convert("RGB").resize((WIDTH, SIDE))
ROW = {"image": IMAGE, "caption": "A tabby cat, close-up!", "name": "chelsea.jpg"}


class Prior:
    """The prior's pipeline; what it draws is an image's CLIP embedding."""

    model, kind, folder = "prior", ppdiffusers.KandinskyV22PriorPipeline, "prior"

    def __init__(self, folders, **parts):
        self.folders, self.pipe = folders, self.kind.from_pretrained(str(folders[self.folder]), **parts)
        self.pipe.set_progress_bar_config(disable=True)

    def generate(self, **options):
        return self.pipe(ROW["caption"], output_type="np", num_inference_steps=STEPS, **options).image_embeds

    def noised(self, clean, timestep, noise):
        return self.pipe.scheduler.add_noise(clean, noise, paddle.to_tensor([timestep]))

    @cached_property
    def embeds(self):
        """The embeddings of the image and of none, as the pipeline makes them for variations of an image."""
        return self.pipe.interpolate([IMAGE], [1.0], num_inference_steps=2)

    @cached_property
    def expected(self):
        return self.embeds.image_embeds.numpy()


class Decoder(Prior):
    """The decoder's pipeline, conditioned on an image embedding."""

    model, kind, folder = "unet", ppdiffusers.KandinskyV22Pipeline, "decoder"

    @cached_property
    def embeds(self):
        return Prior(self.folders).embeds

    def generate(self, **options):
        options |= {"output_type": "np", "num_inference_steps": STEPS, "height": SIDE, "width": SIDE}
        return self.pipe(**self.embeds, **options).images

    @cached_property
    def expected(self):
        movq = self.pipe.movq
        return encoded_and_decoded(lambda x: movq.decode(movq.encode(x).latents, force_not_quantize=True).sample)


class SD(Prior):
    model, kind, folder, conditioning = "unet", ppdiffusers.StableDiffusionPipeline, "sd", {}

    def generate(self, **options):
        options |= {
            "output_type": "np",
            "num_inference_steps": STEPS,
            "height": SIDE,
            "width": SIDE,
            **self.conditioning,
        }
        return self.pipe(ROW["caption"], **options).images

    @cached_property
    def expected(self):
        vae = self.pipe.vae
        return encoded_and_decoded(lambda x: vae.decode(vae.encode(x).latent_dist.mode()).sample)


class SDXL(SD):
    kind, folder = ppdiffusers.StableDiffusionXLPipeline, "sdxl"
    conditioning = {"original_size": (SIDE, WIDTH), "crops_coords_top_left": (0, LEFT), "target_size": (SIDE, SIDE)}


class SDXLWithoutZeros(SDXL):
    folder = "sdxl without zeros"  # which knows no prompt as an empty text


class Entries(ppdiffusers.FlowMatchEulerDiscreteScheduler):
    """Visits entries of its table. Where the table is shifted, the library's own steps lie between them."""

    def set_timesteps(self, steps):
        self.__init__(**self.config)
        entries = np.linspace(0, len(self) - 1, steps).astype(int).tolist()
        self.timesteps = self.timesteps[entries]
        self.sigmas = paddle.concat([self.sigmas[entries], paddle.zeros([1])])


class SD3(SD):
    model, kind, folder, parts = "transformer", ppdiffusers.StableDiffusion3Pipeline, "sd3", {}

    def __init__(self, folders):
        super().__init__(folders, **self.parts)
        self.pipe.scheduler = Entries.from_config(self.pipe.scheduler.config)

    def noised(self, clean, timestep, noise):
        self.pipe.scheduler.set_timesteps(STEPS)  # or it would continue from its current step
        return self.pipe.scheduler.scale_noise(clean, timestep, noise)


class SD3WithoutT5(SD3):
    parts = dict.fromkeys(("text_encoder_3", "tokenizer_3"))


class Job(NamedTuple):
    """A script below examples/ and the pipeline that draws with its result.

    A student of a distillation draws with LCM's scheduler, at `student_scale`; its teacher is looked at, too.
    """

    script: str
    kind: type
    student_scale: float = None
    flags: tuple = ()


KANDINSKY, XL, LCM = "kandinsky2_2/train_text_to_image", "sdxl/train_text_to_image", "lcm/train_lcm_distill"
MMDIT = "sd3/train_text_to_image"
JOBS = {
    "prior": Job(f"{KANDINSKY}_prior", Prior),
    "prior lora": Job(f"{KANDINSKY}_prior_lora", Prior),
    "decoder": Job(f"{KANDINSKY}_decoder", Decoder),
    "decoder lora": Job(f"{KANDINSKY}_decoder_lora", Decoder),
    "sd": Job("stable_diffusion/train_text_to_image", SD),
    "sd lora of all": Job("stable_diffusion/train_text_to_image_lora", SD, flags=("--train_text_encoder",)),
    "sdxl": Job(f"{XL}_sdxl", SDXL),
    "sdxl without zeros": Job(f"{XL}_sdxl", SDXLWithoutZeros),
    "sdxl lora": Job(f"{XL}_lora_sdxl", SDXL),
    "sdxl lora of all": Job(f"{XL}_lora_sdxl", SDXL, flags=("--train_text_encoder",)),
    "sd3": Job(f"{MMDIT}_sd3", SD3),
    "sd3 without t5": Job(f"{MMDIT}_sd3", SD3WithoutT5, flags=("--no_t5",)),
    "sd3 lora": Job(f"{MMDIT}_lora_sd3", SD3),
    "sd3 lora without t5": Job(f"{MMDIT}_lora_sd3", SD3WithoutT5, flags=("--no_t5",)),
    "lcm sd": Job(f"{LCM}_sd_wds", SD, SCALE),
    "lcm sd lora": Job(f"{LCM}_lora_sd_wds", SD, 1.0),
    "lcm sdxl": Job(f"{LCM}_sdxl_wds", SDXL, SCALE),
    "lcm sdxl lora": Job(f"{LCM}_lora_sdxl_wds", SDXL, 1.0),
    "lcm sdxl lora without zeros": Job(f"{LCM}_lora_sdxl_wds", SDXLWithoutZeros, 1.0),
}


def encoded_and_decoded(autoencoder):
    """The cropped image, prepared and returned as ppdiffusers does."""
    decoded = autoencoder(VaeImageProcessor().preprocess(IMAGE.crop((LEFT, 0, LEFT + SIDE, SIDE))))
    return (decoded / 2 + 0.5).clip(0, 1).transpose([0, 2, 3, 1]).numpy()


@pytest.fixture(scope="module")
def pipelines(kandinsky, sd, sdxl, sd3, tmp_path_factory):
    """The tiny pipelines by kind; the prior has statistics that change embeddings, as the published one has."""
    prior, without_zeros = (tmp_path_factory.mktemp(name) / name for name in ("prior", "sdxl"))
    shutil.copytree(kandinsky[0], prior)
    generator, arrays = np.random.default_rng(0), weights(prior, "prior")
    arrays["clip_mean"] += generator.normal(size=arrays["clip_mean"].shape)
    arrays["clip_std"] *= generator.uniform(1, 2, arrays["clip_std"].shape)
    save_file(arrays, prior / "prior" / "diffusion_paddle_model.safetensors", {"format": "pd"})
    index = shutil.copytree(sdxl, without_zeros) / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    folders = {"prior": prior, "decoder": kandinsky[1], "sd": sd, "sdxl": sdxl, "sdxl without zeros": without_zeros}
    folders["sd3"] = sd3
    return {kind: kind(folders) for kind in {job.kind for job in JOBS.values()}}


def build(name, pipelines):
    """A job's training module."""
    job, folders = JOBS[name], pipelines[JOBS[name].kind].folders
    script = load_script(ROOT / "examples" / f"{job.script}.py")
    if job.kind in (Prior, Decoder):
        flags = [f"--pretrained_{part}_model_name_or_path={folders[part]}" for part in ("prior", "decoder")]
    else:
        model = "teacher_model" if job.student_scale else "model_name_or_path"
        flags = ["--center_crop", f"--pretrained_{model}={folders[job.kind.folder]}"]
    flags += [*job.flags, *short_run(PHOTOS), f"--resolution={SIDE}"]
    return module_class(script)(script.build_parser().parse_args(flags))


class NoCaption(RowDraws):
    """The draws of a sample whose caption is dropped."""

    def bernoulli(self, name, probability):
        return name == "drop_caption"


class Given(NamedTuple):
    """Draws for a batch of one: always the same noise, a given timestep, the guidance that pipelines call `SCALE`."""

    timestep: int

    def normal(self, name, shape=()):
        return paddle.to_tensor(np.random.default_rng(0).standard_normal([1, *shape], dtype=np.float32))

    def integers(self, name, low, high):
        return paddle.to_tensor([(self.timestep + 1) * high // 1000 - 1])  # a solver counts only its own steps

    def categorical(self, name, density):
        return (build_scheduler().timesteps == self.timestep).nonzero().flatten()  # SD3's table

    def uniform(self, name, low, high):
        return paddle.to_tensor([SCALE - 1])


@contextmanager
def wrapped(models, wrapper):
    """Calls of `models` are `wrapper(forward, *args, **kwargs)`."""
    forwards = [model.forward for model in models]
    for model, forward in zip(models, forwards):
        model.forward = wraps(forward)(partial(wrapper, forward))
    try:
        yield
    finally:
        for model, forward in zip(models, forwards):
            model.forward = forward


@contextmanager
def recorded(models):
    """The calls of `models`, in order: {name of an argument: array}, an empty one for None."""
    calls = []
    with wrapped(models, partial(record, calls)):
        yield calls


def record(calls, forward, *args, **kwargs):
    bound = inspect.signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    (_, sample), *others = bound.arguments.items()
    call = {"sample": sample}
    for name, value in others:
        call |= value if isinstance(value, dict) else {name: value} if name != "return_dict" else {}
    call["timestep"] = paddle.to_tensor(call["timestep"]).reshape([-1])
    calls.append({name: np.asarray([] if value is None else value) for name, value in call.items()})
    return forward(*args, **kwargs)


def keep(answers, forward, *args, **kwargs):
    output = forward(*args, **kwargs)
    answers.append(output[0])
    return output


def replace(answer, forward, *args, **kwargs):
    output = forward(*args, **kwargs)
    paddle.assign(answer, output[0])
    return output


def generated(pipeline, samples, **options):
    """What a pipeline feeds its model, and what it draws, where it gets `samples` step by step as far as there are."""
    first, *later = [paddle.to_tensor(sample) for sample in samples]
    options["callback_on_step_end"] = lambda pipe, step, *_: {"latents": later[step]} if step < len(later) else {}
    with recorded([getattr(pipeline.pipe, pipeline.model)]) as calls:
        return calls, np.asarray(pipeline.generate(latents=first, **options))


def disagreements(name, module, pipelines, directory):
    """What differs between the training of a job's module and its pipelines: {"where: argument"}."""
    job, pipeline = JOBS[name], pipelines[JOBS[name].kind]
    found, student, model_class = set(), pipeline, type(getattr(pipeline.pipe, pipeline.model))
    if job.student_scale:
        parts = pipeline.pipe.components
        parts["scheduler"] = ppdiffusers.LCMScheduler.from_config(parts["scheduler"].config)
        if job.student_scale > 1:
            module.save_weights(str(directory))
            parts["unet"] = model_class.from_pretrained(f"{directory}/unet_target")
        student = job.kind(pipeline.folders, **parts)
    scheduler = student.pipe.scheduler
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.tolist()

    def fed(timestep, draws=RowDraws):
        sample = {name: paddle.to_tensor(array[None]) for name, array in module.preprocess(ROW, draws(0, 0)).items()}
        with paddle.no_grad(), recorded([m for m in module.children() if isinstance(m, model_class)]) as calls:
            module(encode_batch(module, sample), Given(timestep))
        return calls  # of a distillation: student, teacher with and without caption, target

    def compare(where, trained, inferred, but=()):
        for name in (trained.keys() | inferred.keys()) - set(but):
            one, other = (call.get(name, np.zeros(0)) for call in (trained, inferred))
            if one.shape != other.shape or not np.allclose(one, other, rtol=1e-5, atol=1e-5):
                found.add(f"{where}: {name}")

    steps, with_caption = [fed(timestep) for timestep in timesteps], 1 if job.student_scale else 0
    samples = [calls[0]["sample"] for calls in steps]
    noise = Given(0).normal("noise", samples[0].shape[1:])
    none, last = paddle.zeros_like(noise), timesteps[-1]
    clean = (paddle.to_tensor(samples[-1]) - student.noised(none, last, noise)) / student.noised(none + 1, last, none)
    for timestep, sample in zip(timesteps, samples):
        compare("schedule", {"sample": sample}, {"sample": student.noised(clean, timestep, noise).numpy()})

    samples.append(clean.numpy())
    unguided, result = generated(student, samples, guidance_scale=job.student_scale or 1.0)
    compare("end", {"picture": result}, {"picture": student.expected})
    options = {"timesteps": timesteps} if job.student_scale else {}
    guided, _ = generated(pipeline, samples, guidance_scale=SCALE, **options)
    for calls, inferred, both in zip(steps, unguided, guided, strict=True):
        nothing, caption = ({n: a[half, None] if len(a) == 2 else a for n, a in both.items()} for half in (0, 1))
        compare("unguided", calls[0], inferred)
        compare("guided", calls[with_caption], caption)
        if job.student_scale:
            compare("target", calls[3], inferred, but=("sample", "timestep"))
            compare("without caption", calls[2], nothing)
    compare("dropped caption", fed(last, NoCaption)[with_caption], nothing)
    return found


@pytest.mark.once
@pytest.mark.parametrize("name", JOBS)
def test_training_feeds_the_model_what_its_pipeline_feeds_it(name, pipelines, tmp_path):
    assert disagreements(name, build(name, pipelines), pipelines, tmp_path) == set()


@pytest.mark.parametrize("name", ["prior", "decoder", "sd", "sdxl", "sd3"])
def test_what_training_wants_the_model_to_say_leads_its_pipeline_to_the_image(name, pipelines):
    module, pipeline = build(name, pipelines), pipelines[JOBS[name].kind]
    pipeline.pipe.scheduler.set_timesteps(STEPS)
    timestep = pipeline.pipe.scheduler.timesteps[-1].item()
    sample = {name: paddle.to_tensor(array[None]) for name, array in module.preprocess(ROW, RowDraws(0, 0)).items()}
    said = []
    with recorded([model := getattr(module, pipeline.model)]) as calls, wrapped([model], partial(keep, said)):
        loss = module(encode_batch(module, sample), Given(timestep))
    (gradient,) = paddle.grad(loss, said)
    wanted = said[0] - 2 * loss / (gradient**2).sum() * gradient  # there the mean of squares is zero
    with wrapped([getattr(pipeline.pipe, pipeline.model)], partial(replace, wanted)):
        _, result = generated(pipeline, [calls[0]["sample"]] * STEPS, guidance_scale=1.0)
    # In float32, UnCLIP's scheduler knows its smallest β to three digits.
    assert np.allclose(result, pipeline.expected, atol=5e-3 if name == "prior" else 1e-5)


def encode_otherwise(name, change, module):
    encode = module.encode
    module.encode = lambda batch: (encoded := encode(batch)) | {name: change(encoded[name])}


def leave_t5_out(embeds):
    clip, t5 = embeds.chunk(2, axis=1)
    return paddle.concat([clip, paddle.zeros_like(t5)], axis=1)


def leave_guidance_out(module):
    module.predict_with_student = lambda unet, noisy, timesteps, cond, _: unet(noisy, timesteps, **cond).sample


@pytest.mark.once
@pytest.mark.parametrize(
    "name, spoil, argument",
    [
        ("sdxl", lambda module: module.vae.register_to_config(scaling_factor=1.0), "picture"),
        ("sd3", lambda module: module.vae.register_to_config(scaling_factor=1.0), "picture"),
        ("sd3 lora", lambda module: module.vae.register_to_config(shift_factor=0.0), "picture"),
        ("sd3", partial(encode_otherwise, "prompt_embeds", leave_t5_out), "encoder_hidden_states"),
        ("prior", lambda module: module.prior.clip_std.set_value(module.prior.clip_std * 2), "picture"),
        ("decoder", partial(encode_otherwise, "latents", lambda latents: latents * 0.18), "picture"),
        ("prior", partial(encode_otherwise, "text_mask", paddle.ones_like), "attention_mask"),
        ("sdxl lora", partial(encode_otherwise, "time_ids", lambda ids: ids.flip(1)), "time_ids"),
        ("lcm sd", leave_guidance_out, "timestep_cond"),
    ],
)
def test_what_is_left_out_of_training_is_found(name, spoil, argument, pipelines, tmp_path):
    module = build(name, pipelines)
    spoil(module)
    assert {place.split(": ")[1] for place in disagreements(name, module, pipelines, tmp_path)} == {argument}
