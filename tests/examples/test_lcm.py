"""The four jobs of latent consistency distillation, through their scripts."""

import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
import paddle
import pytest
from ppdiffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.models.lora import lora_switched_off
from ppdiffusers_train.runtime import precision
from tests.conftest import (
    builder,
    encode,
    guide_on_toys,
    optimizer_state,
    photo_shards,
    runner,
    same,
    scalars,
    short_run,
    tensors,
    weights,
)
from tests.toy_pipelines import build_sd

FULL, LORA = ["sd", "sdxl"], ["lora_sd", "lora_sdxl"]
LORA_FILES = ("paddle_lora_weights.safetensors", "pytorch_lora_weights.safetensors", "lora.safetensors")


@pytest.fixture
def teacher(sd, sdxl):
    """The teacher's flag for a job."""
    return lambda name: f"--pretrained_teacher_model={sdxl if 'sdxl' in name else sd}"


@pytest.fixture
def train(lcm_jobs, photos, teacher, tmp_path):
    """`train("lora_sd", *flags, out="out")` runs that script's `main` and returns its output folder."""

    def train(name, *flags, out="out"):
        folder, *others = short_run(photos)
        if not any(str(flag).startswith("--train_shards") for flag in flags):
            others.append(folder)
        return runner(lcm_jobs, others, tmp_path)(name, teacher(name), *flags, out=out)

    return train


@pytest.fixture
def build(lcm_jobs, photos, teacher):
    """`build("sd", *flags)` is that script's training module."""
    make = builder(lcm_jobs, short_run(photos))
    return lambda name, *flags: make(name, teacher(name), *flags)


def batch_of(module):
    return encode(module, build_dataset(module.args), [0, 1])


def trained_weights(name, folder):
    return tensors(folder / LORA_FILES[0]) if "lora" in name else weights(folder)


@pytest.mark.once
def test_the_guides_command_runs(lcm_jobs, train):
    words = """--pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5
        --output_dir=x --mixed_precision=fp16
        --resolution=512 --learning_rate=1e-6 --loss_type=huber --ema_decay=0.95 --adam_weight_decay=0.0
        --max_train_steps=1000 --max_train_samples=4000000 --dataloader_num_workers=8 --validation_steps=200
        --checkpointing_steps=200 --checkpoints_total_limit=10 --train_batch_size=12 --gradient_checkpointing
        --enable_xformers_memory_efficient_attention --gradient_accumulation_steps=1 --use_8bit_adam
        --resume_from_checkpoint=latest --report_to=wandb --seed=453645634 --push_to_hub""".split()
    for name in FULL:
        args = lcm_jobs[name].build_parser().parse_args(words)
        assert (args.w_min, args.w_max, args.num_ddim_timesteps) == ({"sd": 5.0, "sdxl": 3.0}[name], 15.0, 50)
        assert len(scalars(train(name, *guide_on_toys(lcm_jobs[name], words), out=name))) == 1


@pytest.mark.parametrize("name", FULL)
def test_the_student_starts_as_its_teacher_where_guidance_has_no_effect(build, name):
    module = build(name)
    encoded = batch_of(module)
    noisy, times = encoded["latents"], paddle.to_tensor([19, 999])
    condition, _ = module.conditions(encoded)
    with paddle.no_grad():
        module.unet.time_embedding.cond_proj.weight.zero_()
        student = module.predict_with_student(module.unet, noisy, times, condition, paddle.to_tensor([3.0, 9.0]))
        assert np.allclose(student.numpy(), module.predict_with_teacher(noisy, times, condition).numpy(), atol=1e-6)


@pytest.mark.once
def test_a_teacher_whose_file_says_nothing_of_guidance_gets_a_student_that_is_told_it(build, sd, tmp_path):
    """As the published configurations, which are older than the setting."""
    folder = shutil.copytree(sd, tmp_path / "old")
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["time_cond_proj_dim"]
    file.write_text(json.dumps(config))
    module = build("sd", f"--pretrained_teacher_model={folder}", "--unet_time_cond_proj_dim=32")
    assert module.unet.config.time_cond_proj_dim == module.unet_target.config.time_cond_proj_dim == 32
    assert module(batch_of(module), Draws(0, [0, 1])).item() > 0


@pytest.mark.parametrize("name", LORA)
def test_with_fresh_lora_layers_teacher_student_and_target_are_one(build, name):
    module = build(name)
    encoded = batch_of(module)
    condition, _ = module.conditions(encoded)
    inputs = (encoded["latents"], paddle.to_tensor([19, 999]), condition)
    with paddle.no_grad():
        teacher = module.predict_with_teacher(*inputs).numpy()
        assert np.allclose(module.predict_with_student(module.unet, *inputs, None).numpy(), teacher, atol=1e-6)
        for parameter in module.trainable_parameters():
            parameter.set_value(paddle.ones_like(parameter) * 0.02)
        changed = module.predict_with_student(module.unet, *inputs, None).numpy()
        assert np.abs(changed - teacher).max() > 1e-3
        assert np.array_equal(module.predict_with_teacher(*inputs).numpy(), teacher), "the teacher is the base"
        assert np.array_equal(module.predict_with_student(module.unet_target, *inputs, None).numpy(), changed)
    assert len([name for name, model in module.named_children() if isinstance(model, UNet2DConditionModel)]) == 1


@pytest.mark.parametrize("name", FULL)
def test_the_target_follows_the_student_and_both_are_written(train, build, name):
    out = train(name, "--ema_decay=0.5", "--max_train_steps=1", "--checkpointing_steps=1", "--report_to=none")
    start = build(name).unet.state_dict()
    student, target = weights(out, "unet"), weights(out, "unet_target")
    for key, value in start.items():
        assert np.allclose(target[key], (value.numpy() + student[key]) / 2, atol=1e-6), key
    assert not same(student, target)
    for part in ("unet", "unet_target"):
        assert same(weights(out / "checkpoint-1", part), weights(out, part))
        assert UNet2DConditionModel.from_pretrained(str(out / part)).config.time_cond_proj_dim == 256


@pytest.mark.parametrize(
    "name, source", [("sd", "shards"), ("sdxl", "folder"), ("lora_sd", "stream"), ("lora_sdxl", "folder")]
)
def test_five_steps_equal_two_and_three_more_bit_for_bit(train, photos, tmp_path, name, source):
    flags = ["--random_flip", "--loss_type=huber", "--lr_scheduler=linear", "--lr_warmup_steps=2"]
    flags += ["--max_train_steps=5"]
    if source != "folder":
        shards = f"{photo_shards(photos, tmp_path / 'shards')}/{{0..2}}.tar"
        shards = f"pipe:cat {shards}" if source == "stream" else shards
        flags += [f"--train_shards_path_or_url={shards}", "--max_train_samples=7", "--dataloader_num_workers=2"]
    whole = train(name, *flags, "--checkpointing_steps=5", out="whole")
    parts = train(name, *flags, "--checkpointing_steps=2", out="parts")
    resume = f"--resume_from_checkpoint={parts / 'checkpoint-2'}"
    train(name, *flags, "--checkpointing_steps=5", resume, out="parts")
    assert scalars(whole) == scalars(parts) and len(scalars(parts)) == 5
    assert same(*(optimizer_state(folder / "checkpoint-5") for folder in (whole, parts)))
    assert same(trained_weights(name, whole), trained_weights(name, parts))
    if name in FULL:
        assert same(weights(whole, "unet_target"), weights(parts, "unet_target"))


@pytest.mark.once
@pytest.mark.parametrize("name", FULL + LORA)
def test_cached_and_online_runs_are_the_same_and_validation_changes_nothing(train, name):
    plain = train(name, "--center_crop", out="plain")
    flags = ["--encoded_cache", "--validation_prompt=a cat", "--validation_steps=2", "--num_validation_images=1"]
    validated = train(name, "--center_crop", *flags, out="validated")
    assert scalars(plain) == scalars(validated) and same(trained_weights(name, plain), trained_weights(name, validated))
    assert len(list((validated / "validation").iterdir())) == 1


@pytest.mark.once
def test_every_flag_of_the_distillation_changes_the_loss(train):
    base = scalars(train("sd", out="base"))[0]
    for number, flag in enumerate(
        ["--w_min=0", "--w_max=30", "--num_ddim_timesteps=25", "--loss_type=huber", "--timestep_scaling_factor=1",
         "--proportion_empty_prompts=0.99", "--unet_time_cond_proj_dim=32", "--interpolation_type=nearest"]
    ):  # fmt: skip
        assert scalars(train("sd", flag, "--max_train_steps=1", out=str(number)))[0] != base, flag
    lora = scalars(train("lora_sd", out="lora"))
    for number, flag in enumerate(["--lora_dropout=0.5", "--lora_rank=2", "--lora_target_modules=to_q", "--scale_lr"]):
        assert scalars(train("lora_sd", flag, out=f"lora{number}"))[1] != lora[1], flag
    huber = [
        scalars(train("sd", "--loss_type=huber", f"--huber_c={c}", "--max_train_steps=1", out=f"c{c}"))[0]
        for c in (0.001, 1)
    ]
    assert huber[0] != huber[1]


@pytest.mark.once
def test_samples_may_be_encoded_together(build, monkeypatch):
    one, three = build("sd"), build("sd", "--vae_encode_batch_size=3")
    rows = build_dataset(one.args)
    sizes, encode_three = [], three.encode
    three.encode = lambda batch: sizes.append(len(batch["input_ids"])) or encode_three(batch)
    alone, together = encode(one, rows, range(4)), encode(three, rows, range(4))
    assert sizes == [3, 1]
    assert all(np.allclose(alone[name].numpy(), together[name].numpy(), atol=1e-5) for name in alone)


@pytest.mark.once
def test_another_vae_encodes_the_images(build, tmp_path):
    vae = build_sd(tmp_path, seed=1) / "vae"
    own, other = build("sd"), build("sd", f"--pretrained_vae_model_name_or_path={vae}")
    assert not np.allclose(*(batch_of(module)["latents"].numpy() for module in (own, other)))


@pytest.mark.parametrize(
    "name, flags, low",
    [
        ("sd", [], {"text_encoder"}),
        ("sd", ["--cast_teacher_unet"], {"text_encoder", "teacher"}),
        ("sdxl", [], {"text_encoder", "text_encoder_2"}),
        ("lora_sd", ["--lora_rank=1"], {"text_encoder", "unet"}),
    ],
)
def test_what_is_frozen_takes_the_low_type_but_target_teacher_and_vae(build, monkeypatch, name, flags, low):
    monkeypatch.setattr(precision, "computes_in_low_precision", lambda: True)
    lowered = []
    monkeypatch.setattr(paddle.amp, "decorate", lambda model, *_, **options: lowered.append((model, options["dtype"])))
    module = build(name, *flags)
    precision.Precision("fp16").cast_models(module, None)
    names = {id(model): name for name, model in module.named_children()}
    assert {names[id(model)] for model, _ in lowered} == low and {dtype for _, dtype in lowered} == {"float16"}


@pytest.mark.once
@pytest.mark.parametrize("flags, expected", [([], (90, 120)), (["--use_fix_crop_and_size"], (64, 64))])
def test_sizes_are_height_and_width(build, flags, expected):
    from PIL import Image

    module = build("sdxl", *flags)
    row = {"image": Image.new("RGB", (120, 90)), "caption": "x", "name": "x"}
    samples = [module.preprocess(row, RowDraws(0, position)) for position in range(4)]
    assert all(sample["time_ids"].tolist()[:2] == list(expected) for sample in samples)
    assert all(sample["time_ids"].tolist()[4:] == [64, 64] for sample in samples)
    lefts = {sample["time_ids"].tolist()[3] for sample in samples}
    assert lefts == {0.0} if flags else len(lefts) > 1


@pytest.mark.parametrize("name", FULL)
def test_a_full_result_draws_in_four_steps(train, sd, sdxl, name):
    out = train(name)
    unet = UNet2DConditionModel.from_pretrained(str(out / "unet"))
    kind, base, more = (
        (StableDiffusionXLPipeline, sdxl, {"add_watermarker": False})
        if name == "sdxl"
        else (StableDiffusionPipeline, sd, {"safety_checker": None})
    )
    pipe = kind.from_pretrained(str(base), unet=unet, **more)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pictures = []
    for scale in (1.0, 8.0):
        paddle.seed(0)
        options = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "np"}
        pictures.append(np.asarray(pipe("sushi", height=64, width=64, **options).images[0]))
    assert pictures[0].shape == (64, 64, 3) and not np.array_equal(*pictures), "the student is conditioned on guidance"


@pytest.mark.parametrize("name", LORA)
def test_a_lora_result_draws_in_four_steps_and_its_files_hold_alpha(train, sd, sdxl, build, name):
    out = train(name, "--lora_rank=8", "--lora_alpha=4", "--learning_rate=1e-2", "--checkpointing_steps=2")
    assert all((out / file).is_file() for file in LORA_FILES)
    kohya = tensors(out / LORA_FILES[2])
    assert {float(value) for key, value in kohya.items() if key.endswith(".alpha")} == {4.0}
    module = build(name, "--lora_rank=8", "--lora_alpha=4")
    module.load_weights(str(out / "checkpoint-2"))
    encoded = batch_of(module)
    condition, _ = module.conditions(encoded)
    inputs = (encoded["latents"], paddle.to_tensor([19, 999]))
    ours = module.predict_with_student(module.unet, *inputs, condition, None).numpy()
    kind, base = (StableDiffusionXLPipeline, sdxl) if "sdxl" in name else (StableDiffusionPipeline, sd)
    more = {"add_watermarker": False} if "sdxl" in name else {"safety_checker": None}
    for file in (LORA_FILES[0], LORA_FILES[2]):
        pipe = kind.from_pretrained(str(base), **more)
        pipe.load_lora_weights(str(out), weight_name=file)
        assert np.allclose(pipe.unet(*inputs, **condition).sample.numpy(), ours, atol=1e-5), file
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    image = pipe("sushi", height=64, width=64, num_inference_steps=4, guidance_scale=1.0).images[0]
    assert image.size == (64, 64)


@pytest.mark.once
def test_the_teacher_is_switched_back_on_after_an_error(build):
    module = build("lora_sd")
    with pytest.raises(RuntimeError), lora_switched_off(module.unet):
        raise RuntimeError
    assert module(batch_of(module), Draws(0, [0, 1])).item() >= 0
    assert all(layer.lora_layer is not None for layer in module.unet.sublayers() if hasattr(layer, "set_lora_layer")
               and type(layer).__name__.startswith("LoRACompatible") and layer.lora_layer)  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--w_min=20", "--w_min: 20 is above --w_max, which is 15"),
        ("--num_ddim_timesteps=2000", "--num_ddim_timesteps: 2000 is more than the 1000 timesteps of the teacher"),
        ("--resolution=66", "--resolution: 66 does not fit this VAE; expected a multiple of 4"),
        ("--loss_type=l1", "--loss_type: invalid choice: 'l1'"),
    ],
)
def test_a_mistake_is_one_line(train, capsys, flag, message):
    with pytest.raises(SystemExit) as stopped:
        train("sd", flag)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
