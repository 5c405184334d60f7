"""LoRA files of torch's libraries: what diffusers and PEFT compute with them, a run computes that starts from them."""

import ppdiffusers_train  # noqa: F401

import json
import math

import numpy as np
import paddle
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from ppdiffusers import UNet2DConditionModel as PaddleUNet
from safetensors.torch import save_file

from ppdiffusers_train.cli import main as cli
from ppdiffusers_train.models.lora import add_lora, initialize_lora, load_lora
from tests.parity.common import randomize
from tests.parity.test_lora import close

TEXT, POOLED, TIME_IDS = 32, 16, 8
TARGETS = "to_q,to_k,to_out.0,proj_in,proj_out,ff.net.2,conv1,conv2,conv_shortcut,time_emb_proj,conv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet with SDXL's blocks, two layers in each, as the original code counts them."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=TEXT,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_IDS,
    )
    target = tmp_path_factory.mktemp("unet")
    randomize(unet, seed=5).save_pretrained(target)
    return target


def torch_unet(folder):
    return UNet2DConditionModel.from_pretrained(folder).eval()


def paddle_unet(folder):
    return PaddleUNet.from_pretrained(str(folder), from_diffusers=True)


def answers(unet):
    """The output of either library's UNet for fixed inputs."""
    random, is_torch = np.random.default_rng(0), isinstance(unet, torch.nn.Module)

    def normal(*shape):
        array = random.standard_normal(shape).astype("float32")
        return torch.tensor(array) if is_torch else paddle.to_tensor(array)

    unet.eval()
    with torch.no_grad(), paddle.no_grad():
        conditions = {"text_embeds": normal(2, POOLED), "time_ids": normal(2, 6)}
        return unet(normal(2, 4, 16, 16), 7, normal(2, 5, TEXT), added_cond_kwargs=conditions).sample.numpy()


def assert_read_alike(folder, path, expected, rank, output):
    """The file computes what is expected: loaded, as the start of a run of another rank and alpha, and converted."""
    base = answers(paddle_unet(folder))
    assert not close(base, expected)
    loaded = paddle_unet(folder)
    load_lora(loaded, path)
    assert close(answers(loaded), expected)
    started, lines = paddle_unet(folder), []
    add_lora(started, TARGETS, rank + 1, alpha=rank * 3.0)
    initialize_lora(path, started, TARGETS, lines.append)
    assert close(answers(started), expected) and any("padded with zeros" in line for line in lines)
    cli(["lora", "resize", str(path), "--rank", str(rank), "--output", str(output)])
    again = paddle_unet(folder)
    again.load_attn_procs(str(output))
    assert close(answers(again), expected)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {"attn1.to_q": 1, "conv1": 8}}])
def test_what_peft_saves(folder, tmp_path, options):
    """α stands in `adapter_config.json` beside it, or in the metadata, as diffusers from 0.35 on writes it."""
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False, **options)
    model = get_peft_model(torch_unet(folder), config)
    expected = answers(model)
    model.save_pretrained(tmp_path / "peft")
    assert close(answers(PeftModel.from_pretrained(torch_unet(folder), tmp_path / "peft")), expected)
    assert_read_alike(folder, tmp_path / "peft", expected, 3, tmp_path / "a")

    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    own = {f"unet.{name}": saved[name] for name in ("r", "lora_alpha", "alpha_pattern", "use_rslora")}
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name.replace("base_model.model.", "unet.").replace(".default.", ".")
            tensors[key] = parameter.detach().contiguous()
    save_file(tensors, tmp_path / "new.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(own)})
    loaded = paddle_unet(folder)
    load_lora(loaded, tmp_path / "new.safetensors")
    assert close(answers(loaded), expected)


ORIGINAL = {  # layers of SDXL in kohya's files, by hand: each kind of place once
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_1_attn2_to_k": "mid_block.attentions.0.transformer_blocks.1.attn2.to_k",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_2_1_proj_out": "up_blocks.0.attentions.2.proj_out",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_4_1_transformer_blocks_0_ff_net_2": "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
    "output_blocks_7_0_skip_connection": "up_blocks.2.resnets.1.conv_shortcut",
}


def test_kohyas_names_of_the_original_code(folder, tmp_path):
    generator, layers, tensors = torch.Generator().manual_seed(2), dict(torch_unet(folder).named_modules()), {}
    for name, layer in ORIGINAL.items():
        out, *kernel = layers[layer].weight.shape
        down = torch.randn(3, *kernel, generator=generator) / math.sqrt(math.prod(kernel))
        up = torch.randn(out, 3, *[1] * (len(kernel) - 1), generator=generator)
        tensors |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "kohya.safetensors")
    theirs = torch_unet(folder)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path), weight_name="kohya.safetensors", unet_config=theirs.config
    )
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, theirs)
    assert_read_alike(folder, tmp_path / "kohya.safetensors", answers(theirs), 3, tmp_path / "a")


def test_older_names_of_diffusers_and_what_its_pipeline_saves(folder, tmp_path):
    """`….attn1.processor.to_q_lora.down.weight`, and the names of `save_lora_weights`."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, layer in torch_unet(folder).named_modules():
        if name.endswith((".to_q", ".to_out.0")):
            block, own = name.removesuffix(".0").rsplit(".", 1)
            pair = torch.randn(3, layer.in_features, generator=generator), torch.randn(layer.out_features, 3)
            for part, matrix in zip(("down", "up"), pair):
                tensors[f"unet.{block}.processor.{own}_lora.{part}.weight"] = matrix / 5
    save_file(tensors, tmp_path / "old.safetensors")
    theirs = torch_unet(folder)
    theirs.load_attn_procs(str(tmp_path), weight_name="old.safetensors")
    assert_read_alike(folder, tmp_path / "old.safetensors", answers(theirs), 3, tmp_path / "a")


def test_extracted_and_merged_files_answer_the_same_in_torch(folder, tmp_path):
    """A pipeline of torch's UNet: what `lora merge` writes, diffusers loads; so does what `lora extract` writes."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    torch_unet(folder).save_pretrained(base / "unet")
    wanted = torch_unet(folder)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in wanted.parameters():
            if parameter.ndim > 1:
                parameter += 0.02 * torch.randn_like(parameter)
    wanted.save_pretrained(tuned / "unet")
    for pipeline in (base, tuned):
        index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
        (pipeline / "model_index.json").write_text(json.dumps(index))
    words = ["--base", str(base), "--tuned", str(tuned), "--rank", "9999", "--to", "diffusers"]
    cli(["lora", "extract", *words, "--output", str(tmp_path / "lora")])
    theirs = torch_unet(folder)
    theirs.load_attn_procs(tmp_path / "lora")
    assert close(answers(theirs), answers(wanted))
    cli(["lora", "merge", "--base", str(base), "--lora", str(tmp_path / "lora"), "--output", str(tmp_path / "merged")])
    assert close(answers(torch_unet(tmp_path / "merged" / "unet")), answers(wanted))
