"""Divided weights and variants of diffusers and transformers: read here, written here, read there again."""

import ppdiffusers_train  # noqa: F401

import itertools

import diffusers
import ppdiffusers
import pytest
import torch
import transformers
from ppdiffusers.transformers import CLIPTextModelWithProjection, T5EncoderModel

from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.models.weights import save_model


def build_unet():
    return diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=16,
    )


def build_clip():
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=32,
        )
    )  # fmt: skip


def build_t5():
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )


KINDS = {
    "unet": (build_unet, ppdiffusers.UNet2DConditionModel),
    "text_encoder": (build_clip, CLIPTextModelWithProjection),
    "text_encoder_3": (build_t5, T5EncoderModel),
}


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize(
    "safe, variant, size",
    [*itertools.product((True,), (None, "fp16"), ("10GB", "50KB")), (False, None, "10GB"), (False, None, "50KB")],
)
def test_what_they_write_comes_back_the_same(tmp_path, part, safe, variant, size):
    build, part_class = KINDS[part]
    torch.manual_seed(0)
    theirs = build().half().float()
    expected = theirs.state_dict()
    saved = theirs.half() if variant else theirs
    options = {"safe_serialization": safe, "variant": variant, "max_shard_size": size}
    saved.save_pretrained(tmp_path / "base" / part, **options)
    (tmp_path / "base" / "model_index.json").write_text("{}")
    files = [path for path in (tmp_path / "base" / part).iterdir() if path.suffix in (".safetensors", ".bin")]
    assert (len(files) > 1) == (size == "50KB")
    model = PipelineFolder(tmp_path / "base", "--x", [part], variant=variant).load(part, part_class)
    save_model(model, tmp_path / "back", "diffusers", largest_file=50_000)
    assert len(list((tmp_path / "back").glob("*-of-*.safetensors"))) > 1
    found = type(theirs).from_pretrained(tmp_path / "back").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)
