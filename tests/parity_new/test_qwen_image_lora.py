"""Qwen-Image's training step and its LoRA files, ours against diffusers 0.38 and PEFT: same weights, noise and σ."""

import ppdiffusers_train  # noqa: F401  (before paddle)
from ppdiffusers_train import QwenImagePipeline

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ppdiffusers_train.cpu.patches import apply_patches
from ppdiffusers_train.models.lora import lora_layers, save_lora
from ppdiffusers_train.models.qwen_image.loading import encode_captions, packed, unpacked
from tests.conftest import ROOT, load_script
from tests.parity_new.conftest import assert_close, run_torch
from tests.parity_new.test_qwen_image import CAPTIONS, SIZES, assert_same_images

apply_patches()  # as every run does
JOB = load_script(ROOT / "examples" / "qwen_image" / "train_qwen_image_lora.py")
FILE = "pytorch_lora_weights.safetensors"


class Recorded:
    """Stands in for `Draws` with numbers that both sides get."""

    def __init__(self, noise):
        self.noise = noise

    def normal(self, name, shape):
        assert self.noise.shape[1:] == tuple(shape)
        return paddle.to_tensor(self.noise)

    def categorical(self, name, weights):
        return paddle.arange(len(self.noise))


@pytest.fixture(scope="module")
def module(reference):
    """The job, with torch's LoRA."""
    names = ["--pretrained_model_name_or_path", reference / "pipeline", "--init_lora", reference / "lora"]
    args = JOB.build_parser().parse_args([*map(str, names), "--lora_rank", "3", "--resolution", "64", "--seed", "1"])
    job = JOB.QwenImageLoRATrainingModule(args)
    job.initialize(print)
    return job


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", SIZES[:2])
def test_loss_velocity_and_all_gradients(module, expected, size, count):
    def of(name):
        return expected[f"{name} of {count} {size[0]} {size[1]}"]

    with paddle.no_grad():
        states, mask = encode_captions(module.text_encoder, module.tokenizer(CAPTIONS[:count]))
    encoded = {"latents": paddle.to_tensor(of("latents")), "prompt_embeds": states}
    if count > 1:
        encoded["prompt_embeds_mask"] = mask
    sigmas = paddle.to_tensor(of("sigmas"))
    module.tables = {0: (sigmas, None, None)}
    grid = size[0] // 16, size[1] // 16
    noisy = packed(
        (1 - sigmas.reshape([-1, 1, 1, 1])) * encoded["latents"] + sigmas.reshape([-1, 1, 1, 1]) * of("noise")
    )
    assert_close(module.transformer(noisy, states, mask, sigmas, grid).detach(), of("velocity"))
    assert_close(packed(unpacked(noisy, grid)), noisy, 0)
    module.clear_gradients()
    loss = module(encoded, Recorded(of("noise")))
    loss.backward()
    assert_close(loss.detach(), of("loss"))
    layers = lora_layers(module.transformer)
    assert len(layers) == 12
    for name, lora in layers.items():
        assert_close(lora.down.weight.grad.numpy().T, of(f"gradient {name}.lora_A.default.weight"))
        assert_close(lora.up.weight.grad.numpy().T, of(f"gradient {name}.lora_B.default.weight"))


def as_comfyui(tensors):
    """The names that ComfyUI and DiffSynth-Studio give."""
    return {name.replace("transformer.", "diffusion_model.", 1): array for name, array in tensors.items()}


def as_kohya(tensors):
    """The names that the kohya family gives."""
    found = {}
    for name, array in tensors.items():
        layer, _, part = name.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{layer}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = array
        found[f"{layer}.alpha"] = np.array(3, array.dtype)
    return found


def test_files_of_all_kinds_draw_the_same_here_and_in_diffusers(module, reference, expected):
    folder, theirs = reference / "loras", load_file(reference / "lora" / FILE)
    save_lora(module.transformer, folder, "diffusers")
    (folder / FILE).rename(folder / "ours.safetensors")
    for kind, names in (("comfyui", as_comfyui), ("kohya", as_kohya)):
        save_file(names(theirs), folder / f"{kind}.safetensors", {"format": "pt"})
    for file in sorted(folder.iterdir()):
        pipeline = QwenImagePipeline.from_pretrained(reference / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(file)
        assert_same_images(pipeline, expected, "lora ")
    run_torch("read_loras", reference)
    drawn = load_file(reference / "drawn.safetensors")
    names = [name for name in expected if name.startswith("lora ")]
    assert len(names) == 15
    for name in names:
        for kind in ("ours", "comfyui", "kohya"):
            assert_close(drawn[name.replace("lora", kind, 1)], expected[name])
