"""Single files that we write, read by diffusers: the same weights and pictures as from the folder."""

import ppdiffusers_train  # noqa: F401

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ppdiffusers_train.cli import main
from ppdiffusers_train.models.sd3 import SD3Folder
from ppdiffusers_train.models.sdxl import SDXLFolder
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder
from ppdiffusers_train.toy.models.t5 import build_t5_tokenizer
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from tests.parity.common import write_pipeline
from tests.parity.test_sdxl import build_scheduler, text_config

PICTURE = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "guidance_scale": 5.0}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "projection_dim": 48}  # diffusers finds SDXL's second by its width


def build_vae(**options):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return diffusers.AutoencoderKL(block_out_channels=(32, 32, 64), layers_per_block=2, **blocks, **options)


def build_unet(**options):
    """Three resolutions of two layers, the lowest without attention."""
    return diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=2, norm_num_groups=8, block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, **options,
    )  # fmt: skip


def clip_tokenizer(folder, name):
    build_tokenizer(folder / name)
    return CLIPTokenizer.from_pretrained(str(folder / name))


def stable_diffusion(folder, activation, **options):
    return diffusers.StableDiffusionPipeline(
        vae=build_vae(), text_encoder=CLIPTextModel(text_config(hidden_act=activation)),
        tokenizer=clip_tokenizer(folder, "tokenizer"), unet=build_unet(cross_attention_dim=32, **options),
        scheduler=diffusers.DDIMScheduler.from_config(build_scheduler().config), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder):
    return diffusers.StableDiffusionXLPipeline(
        vae=build_vae(), text_encoder=CLIPTextModel(text_config(hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_act="gelu").from_dict({
            **text_config(hidden_act="gelu").to_dict(), **WIDE,
        })),
        tokenizer=clip_tokenizer(folder, "tokenizer"), tokenizer_2=clip_tokenizer(folder, "tokenizer_2"),
        unet=build_unet(
            cross_attention_dim=96, use_linear_projection=True, transformer_layers_per_block=(1, 2, 1),
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=96,
        ),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(build_scheduler().config), add_watermarker=False,
    )  # fmt: skip


def sd3(folder):
    tokens = len(build_t5_tokenizer(folder / "tokenizer_3"))
    return diffusers.StableDiffusion3Pipeline(
        vae=build_vae(latent_channels=16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(text_config(hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_act="gelu").from_dict({
            **text_config(hidden_act="gelu").to_dict(), **WIDE,
        })),
        text_encoder_3=T5EncoderModel(T5Config(
            vocab_size=tokens, d_model=96, d_kv=32, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        )),
        tokenizer=clip_tokenizer(folder, "tokenizer"), tokenizer_2=clip_tokenizer(folder, "tokenizer_2"),
        tokenizer_3=T5Tokenizer.from_pretrained(str(folder / "tokenizer_3"), extra_ids=0, legacy=True),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=80, pos_embed_max_size=24,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


FAMILIES = {
    "sd1": (lambda folder: stable_diffusion(folder, "quick_gelu"), StableDiffusionFolder),
    "sd2": (lambda folder: stable_diffusion(folder, "gelu", use_linear_projection=True), StableDiffusionFolder),
    "sdxl": (sdxl, SDXLFolder),
    "sd3": (sd3, SD3Folder),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pipelines(request, tmp_path_factory):
    """(torch's pipeline from its folder, the folder, a single file of it that we wrote)."""
    build, folder_class = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "folder"
    write_pipeline(build(folder), folder)
    pipeline = getattr(diffusers, folder_class.pipeline_class.__name__).from_pretrained(folder)
    if request.param == "sd3":  # diffusers takes it for the identity, whatever a single file says
        with torch.no_grad():
            pipeline.text_encoder.text_projection.weight.copy_(torch.eye(32))
        pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    folder_class(folder, None, "--x").export(folder.parent / "single", {}, "single_file")
    return pipeline, folder, folder.parent / "single" / "model.safetensors"


def draw(pipeline):
    for part in models(pipeline).values():
        part.eval()  # diffusers 0.29 leaves T5 of a single file in training mode
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red square", generator=torch.Generator().manual_seed(0), **PICTURE).images


def from_single_file(pipeline, folder, file):
    return type(pipeline).from_single_file(str(file), config=str(folder), local_files_only=True, safety_checker=None)


def models(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def assert_same(name, found, expected):
    """Two dictionaries of tensors are equal to the bit."""
    assert found.keys() == expected.keys()
    wrong = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
    assert not wrong, (name, wrong)


def published(tensors):
    """The tensors of one of our files, with what only the published ones have, and without what they lack."""
    more = {"model_ema.decay": torch.tensor(0.99), "alphas_cumprod": torch.rand(1000)}
    start = "cond_stage_model.model."
    for name, tensor in tensors.items():
        if name.startswith(f"{start}transformer.resblocks.2."):  # SD 2.x: the layer after the last that is used
            more[name.replace("resblocks.2.", "resblocks.3.")] = torch.rand_like(tensor)
        if name.endswith("position_embedding.weight") and "text_encoders" not in name:
            more[name.replace("position_embedding.weight", "position_ids")] = torch.arange(len(tensor))[None]
    if f"{start}positional_embedding" in tensors:
        more |= {f"{start}text_projection": torch.rand(32, 32), f"{start}logit_scale": torch.tensor(4.6)}
    missing = "text_encoders.clip_l.transformer.text_projection.weight"
    return {name: tensor for name, tensor in {**tensors, **more}.items() if name != missing}


def test_we_read_a_file_like_the_published_ones_as_diffusers_does(pipelines, tmp_path):
    pipeline, folder, file = pipelines
    tensors = published(load_file(file))
    save_file(tensors, tmp_path / "published.safetensors", {"format": "pt"})
    torch.save({"state_dict": tensors, "global_step": 7, "callbacks": {}}, tmp_path / "published.ckpt")
    words = ["convert", f"{tmp_path}/published.ckpt", "--to=diffusers", f"--output={tmp_path}/ours"]
    main([*words, f"--single_file_config={folder}"])
    for name, part in models(from_single_file(pipeline, folder, tmp_path / "published.safetensors")).items():
        (ours,) = (tmp_path / "ours" / name).glob("*.safetensors")
        kept = {key: tensor for key, tensor in part.state_dict().items() if key != "encoder.embed_tokens.weight"}
        found = {key: tensor for key, tensor in load_file(ours).items() if key != "encoder.embed_tokens.weight"}
        assert_same(name, found, kept)


def test_diffusers_reads_our_single_file(pipelines):
    pipeline, folder, file = pipelines
    single = from_single_file(pipeline, folder, file)
    for name, part in models(pipeline).items():
        assert_same(name, single.components[name].state_dict(), part.state_dict())
    assert np.abs(draw(single) - draw(pipeline)).max() <= 1e-5
