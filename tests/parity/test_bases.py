"""Bases that torch has written: pickles of both layouts, and models with a LoRA; and results that torch loads."""

import ppdiffusers_train  # noqa: F401

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.tensor_files import read_tensors
from tests.conftest import load_script, short_run
from tests.examples.test_results_are_bases import SCRIPTS, base_flags, only_halves
from tests.parity.test_weights import KINDS, build_unet


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_torch_are_read_to_the_bit(tmp_path, is_zip, dtype):
    torch.manual_seed(0)
    whole = torch.randn(40, 60).to(dtype)
    saved = {"whole": whole, "view": whole[3:9, ::7].T, "shared": whole[5], "parameter": torch.nn.Parameter(whole + 1)}
    saved |= {"number": torch.tensor(3.0, dtype=dtype), "long": torch.randn(300, 300).to(dtype), "ids": torch.arange(9)}
    torch.save(saved, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    found, _ = read_tensors(tmp_path / "x.bin")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        bits = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        assert np.array_equal(np.ascontiguousarray(found[name]).reshape(-1).view("uint8"), bits), name


@pytest.mark.parametrize("unloaded", [False, True])
def test_a_lora_that_is_fused_has_to_be_unloaded(tmp_path, unloaded):
    unet = build_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    unet.fuse_lora()
    if unloaded:
        unet.unload_lora()
    unet.save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text("{}")
    folder = PipelineFolder(tmp_path / "base", "--x", ["unet"])
    if unloaded:
        found = folder.load("unet", KINDS["unet"][1])
        assert np.array_equal(found.conv_in.weight.numpy(), unet.conv_in.weight.detach().numpy())
        return
    with pytest.raises(
        UserError, match=r"to_q\.weight is missing.*: a LoRA is still attached to this model; .*unload_lora"
    ):
        folder.load("unet", KINDS["unet"][1])


@pytest.mark.parametrize(
    "name, flags",
    [("train_text_to_image", ()), ("train_text_to_image_sdxl", ()), ("train_text_to_image_sd3", ()),
     ("train_text_to_image_sd3", ("--no_t5",)), ("train_text_to_image_decoder", ())],
)  # fmt: skip
def test_results_load_plainly_in_torch(request, photos, tmp_path, name, flags):
    """Frozen models of it are float16, as in the base, under plain names."""
    fixture = {"image": "sd", "sdxl": "sdxl", "sd3": "sd3", "decoder": "kandinsky"}[name.rsplit("_", 1)[1]]
    base = request.getfixturevalue(fixture)
    base = base[::-1] if isinstance(base, tuple) else (base,)
    base = [only_halves(part, tmp_path / f"base{number}") for number, part in enumerate(base)]
    load_script(SCRIPTS[name]).main([
        *base_flags(name, *base), *short_run(photos), "--max_train_steps=1", f"--output_dir={tmp_path / 'out'}",
        "--save_format=diffusers", "--no_final_checkpoint", "--variant=fp16", *flags,
    ])  # fmt: skip
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if flags else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", **absent)
    steps = {"prior_num_inference_steps": 2} if fixture == "kandinsky" else {}
    images = pipe("a cat", num_inference_steps=2, height=64, width=64, output_type="np", **steps).images
    assert np.isfinite(images).all()
