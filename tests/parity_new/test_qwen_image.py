"""Qwen-Image's parts and its pipeline, ours against diffusers 0.38 and transformers 5: same weights, same inputs."""

import ppdiffusers_train  # noqa: F401  (before paddle)
from ppdiffusers_train import QwenImagePipeline

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppdiffusers_train.cpu.patches import apply_patches
from ppdiffusers_train.models.qwen_image.loading import QwenImageFolder, encode_captions
from ppdiffusers_train.models.qwen_image.tokenizer import QwenTokenizer
from ppdiffusers_train.models.qwen_image.transformer import QwenImageTransformer2DModel
from ppdiffusers_train.models.unloaded import build_unloaded
from ppdiffusers_train.models.weight_files import find_weights
from ppdiffusers_train.models.weight_names import fitting_tensors
from ppdiffusers_train.models.weights import load_model
from ppdiffusers_train.tensor_files import Computed
from tests.parity_new.conftest import assert_close, run_torch

apply_patches()  # as every run does
CAPTIONS = ["a red square", "the size of the world is 1234, isn't it?\n\n  Für <|im_end|> {x} u\u0308", ""]
SIZES = [(32, 32), (48, 80), (96, 32)]


@pytest.fixture(scope="module")
def folder(reference):
    return QwenImageFolder(reference / "pipeline")


@pytest.fixture(scope="module")
def pipeline(reference):
    drawing = QwenImagePipeline.from_pretrained(reference / "pipeline")
    drawing.set_progress_bar_config(disable=True)
    return drawing


@pytest.mark.parametrize("kind", ["pipeline/tokenizer", "tokenizer_parts"])
def test_tokens(reference, expected, kind):
    found = QwenTokenizer(reference / kind)(CAPTIONS)
    assert [ids.tolist() for ids in found] == [expected[f"tokens {n}"].tolist() for n in range(len(CAPTIONS))]


def test_text_states(folder, expected):
    tokens, encoder = folder.load("tokenizer")(CAPTIONS), folder.load("text_encoder")
    with paddle.no_grad():
        for n, ids in enumerate(tokens):
            states, mask = encode_captions(encoder, [ids])
            assert mask is None
            assert_close(states, expected[f"states {n}"])
        states, mask = encode_captions(encoder, tokens)
    assert_close(states, expected["states"])
    assert mask.numpy().tolist() == expected["mask"].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_vae(folder, expected, size):
    vae, name = folder.load("vae"), f"{size[0]} {size[1]}"
    with paddle.no_grad():
        latents = vae.encode(paddle.to_tensor(expected[f"pixels {name}"]))
        assert_close(latents, expected[f"latents {name}"])
        assert_close(vae.decode(latents), expected[f"decoded {name}"])


def assert_same_images(pipeline, expected, prefix=""):
    """All images of all sizes, with and without a negative prompt."""
    for height, width in SIZES:
        noise = paddle.to_tensor(expected[f"{prefix}noise {height} {width}"])
        for mode, negative in (("alone", None), ("guided", " ")):
            for kind in ("latent", "np"):
                images = pipeline(
                    CAPTIONS, negative, height, width, num_inference_steps=4, latents=noise, output_type=kind
                ).images
                assert_close(images, expected[f"{prefix}{mode} {kind} {height} {width}"])


def test_pipeline(pipeline, expected):
    assert_same_images(pipeline, expected)


class OnlyNames:
    """Files of the published layout, without values."""

    is_torch, files = True, ["the published files"]

    def __init__(self, shapes):
        self.shapes = shapes

    def tensors(self):
        return {name: Computed(np.dtype(np.float16), shape, None) for name, shape in self.shapes.items()}


BILLIONS = {"transformer": 20.43, "vae": 0.0446, "text_encoder": 7.07}  # of parameters


def test_names_and_shapes_of_the_published_size_are_those_of_diffusers(folder, reference):
    run_torch("names", reference)
    shapes = json.loads((reference / "published" / "names.json").read_text())
    for name, billions in BILLIONS.items():
        model = build_unloaded(folder.parts[name], str(reference / "published" / name))
        found = fitting_tensors(model, OnlyNames(shapes[name]))  # refuses what is missing, unknown, or of another shape
        assert found.keys() == model.state_dict().keys()
        assert sum(np.prod(tensor.shape) for tensor in found.values()) == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.slow
def test_a_block_of_the_published_width(tmp_path):
    """Takes 4 GB of memory and 1.4 GB of disk."""
    run_torch("block", tmp_path)
    expected = load_file(tmp_path / "block.safetensors")
    model = load_model(QwenImageTransformer2DModel, str(tmp_path / "block"), find_weights(tmp_path / "block"))
    latents, states, sigmas = (paddle.to_tensor(expected[name]) for name in ("latents", "states", "sigmas"))
    velocity = model(latents, states, None, sigmas, (4, 6))
    assert_close(velocity.detach(), expected["velocity"])
    velocity.square().mean().backward()
    for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"):  # nothing looks at the last block's text
        gradient, found = expected[f"gradient {name}"], getattr(model.transformer_blocks[0].attn, name).weight.grad
        assert_close(found.numpy().T / np.abs(gradient).max(), gradient / np.abs(gradient).max())
