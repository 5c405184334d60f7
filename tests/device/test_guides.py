"""The commands of the guides as they are typed there, with every flag, on the device in software. Changed are only what
costs time or a network: the model, the data, the number of steps and the size of the pictures."""

import ppdiffusers_train  # noqa: F401

import shlex
import subprocess
import sys

import pytest

from tests.conftest import photo_shards, scalars
from tests.device.files import low_tensors, not_finite
from tests.distributed.launching import environment, script

SDXL = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
    --dataset_name=lambdalabs/naruto-blip-captions --enable_xformers_memory_efficient_attention --resolution=512
    --center_crop --random_flip --proportion_empty_prompts=0.2 --train_batch_size=1 --gradient_accumulation_steps=4
    --gradient_checkpointing --max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06 --lr_scheduler="constant"
    --lr_warmup_steps=0 --mixed_precision="fp16" --report_to="wandb"
    --validation_prompt="a cute Sundar Pichai creature" --validation_epochs 5 --checkpointing_steps=5000
    --output_dir="sdxl-naruto-model" """
LCM = """--pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 --output_dir=x --mixed_precision=fp16
    --resolution=512 --learning_rate=1e-6 --loss_type="huber" --ema_decay=0.95 --adam_weight_decay=0.0
    --max_train_steps=1000 --max_train_samples=4000000 --dataloader_num_workers=8 --validation_steps=200
    --checkpointing_steps=200 --checkpoints_total_limit=10 --train_batch_size=12 --gradient_checkpointing
    --enable_xformers_memory_efficient_attention --gradient_accumulation_steps=1 --use_8bit_adam --report_to=wandb
    --seed=453645634"""
KANDINSKY = """--dataset_name=lambdalabs/pokemon-blip-captions --resolution=768 --train_batch_size=1
    --gradient_accumulation_steps=4 {} --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1
    --checkpoints_total_limit=3 --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42
    --output_dir="kandi2-decoder-pokemon-model" """
COMMANDS = {
    "sdxl": SDXL,
    "lora_sdxl": SDXL,
    "lcm_distill_sd": LCM,
    "decoder": KANDINSKY.format("--gradient_checkpointing --mixed_precision=fp16"),
    "prior": KANDINSKY.format("--mixed_precision=fp16 --snr_gamma=5.0"),
    "decoder_lora": KANDINSKY.format('--rank=4 --validation_prompt="cute dragon creature" --mixed_precision=bf16'),
    "prior_lora": KANDINSKY.format('--rank=4 --validation_prompt="cute dragon creature" --mixed_precision=bf16'),
}
SMALL = ["--resolution=32", "--max_train_steps=2", "--report_to=visualdl", "--validation_inference_steps=2"]


def in_place_of_the_hub(jobs, name, tmp_path):
    """The flags that put tiny models and photographs in the place of the guide's."""
    flags = jobs.flags(name)
    if name == "lcm_distill_sd":
        shards = photo_shards(jobs.photos, tmp_path / f"shards-{name}")
        flags = [flag for flag in flags if not flag.startswith("--train_data_dir")]
        flags += [f"--train_shards_path_or_url={shards}/{{0..2}}.tar", "--train_batch_size=2"]
    return [flag for flag in flags if "learning_rate" not in flag and "seed" not in flag]


def typed(command):
    """A guide's flags, without the data set that lies elsewhere."""
    return [word for word in shlex.split(command) if not word.startswith("--dataset_name")]


def check_commands(names, jobs, on_device, tmp_path):
    outs = []
    for name in names:
        outs.append(tmp_path / name)
        flags = [*typed(COMMANDS[name]), *in_place_of_the_hub(jobs, name, tmp_path), *SMALL, f"--output_dir={outs[-1]}"]
        jobs.list.append({"script": str(script(name)), "flags": flags})
    for name, out, report in zip(names, outs, on_device(jobs.list)):
        assert report["status"] == 0, (name, report)
        assert len(scalars(out)) == 2 and "wrote the result" in report["said"], (name, report["said"])
        assert not low_tensors(out) and not not_finite(out), name


@pytest.mark.once
def test_the_guides_commands_with_most_flags(jobs, on_device, tmp_path):
    check_commands(["sdxl", "lcm_distill_sd"], jobs, on_device, tmp_path)


@pytest.mark.precision
def test_all_commands_of_the_guides(jobs, on_device, tmp_path):
    check_commands(list(COMMANDS), jobs, on_device, tmp_path)


@pytest.mark.once
@pytest.mark.parametrize("gpus", ["0,1", pytest.param("0,1,2,3", marks=pytest.mark.precision)])
def test_the_guides_command_for_several_gpus(gpus, device, jobs, tmp_path):
    """Typed as it is there: Paddle's launcher takes `--gpus` for whatever devices there are. Processes end with status
    0: nothing is left that needs a device when it is gone."""
    words = [sys.executable, "-u", "-m", "paddle.distributed.launch", "--gpus", gpus, script("decoder").name]
    words += typed(KANDINSKY.format("--gradient_checkpointing --mixed_precision=fp16"))
    words += [*in_place_of_the_hub(jobs, "decoder", tmp_path), *SMALL, f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        words, cwd=script("decoder").parent,
        env=environment(CUSTOM_DEVICE_ROOT=str(device), PADDLE_XCCL_BACKEND="soft_device", MKL_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(scalars(tmp_path / "out")) == 2 and not low_tensors(tmp_path / "out")
