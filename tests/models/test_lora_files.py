"""Conversion between the formats of LoRA files, through `ppdiffusers-train convert-lora`."""

import ppdiffusers_train  # noqa: F401

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppdiffusers_train.cli import main
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.lora_files import Update, read_lora, write_lora
from ppdiffusers_train.models.lora_libraries import FILES
from ppdiffusers_train.models.lora_names import WORDS, from_kohya_name, kohya_name
from ppdiffusers_train.tensor_files import read_tensors, write_tensors

pytestmark = pytest.mark.once  # no Paddle in it

LAYERS = [
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "unet.up_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
]
CONV = "unet.up_blocks.1.resnets.2.conv_shortcut"


def lora(alpha=None, dtype=np.float32, rank=2):
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32).astype(dtype)

    updates = {layer: Update(normal(rank, 5), normal(7, rank), alpha) for layer in LAYERS}
    return {**updates, CONV: Update(normal(rank, 5, 3, 3), normal(7, rank, 1, 1), alpha)}


def effect(update):
    """(α / r) · B A."""
    up, down = np.float64(update.up.astype(np.float32)), np.float64(update.down.astype(np.float32))
    return update.scale * np.tensordot(up.reshape(up.shape[0], -1), down, axes=1)


def assert_same_effect(one, other, rtol=1e-6):
    assert one.keys() == other.keys()
    for layer in one:
        assert np.allclose(effect(one[layer]), effect(other[layer]), rtol=rtol, atol=rtol), layer


@pytest.mark.parametrize("first", FILES)
@pytest.mark.parametrize("second", FILES)
def test_every_way_keeps_the_effect_and_alpha(tmp_path, first, second):
    original = lora(alpha=3.0)
    write_lora(tmp_path / "a" / FILES[first], original, first)
    target = tmp_path / "b" / FILES[second]
    main(["convert-lora", str(tmp_path / "a"), "--to", second, "--output", str(target)])
    found = read_lora(target)
    assert_same_effect(found, original)
    assert {update.alpha for update in found.values()} == {3.0}


@pytest.mark.parametrize("name", FILES)
def test_a_scale_multiplies_every_update(tmp_path, name):
    original = lora(alpha=3.0)
    write_lora(tmp_path / "a" / FILES[name], original, name)
    for scale in (0.5, 0.0):
        target = tmp_path / f"{scale}.safetensors"
        main(["convert-lora", str(tmp_path / "a"), "--to", name, "--output", str(target), f"--scale={scale}"])
        found = read_lora(target)
        assert all(np.allclose(effect(found[layer]), scale * effect(original[layer]), atol=1e-6) for layer in original)


def test_the_three_layouts_have_these_names_and_shapes(tmp_path):
    for name in FILES:
        write_lora(tmp_path / name, lora(alpha=4.0), name)
    paddle, torch, kohya = (read_tensors(tmp_path / name)[0] for name in FILES)
    layer = LAYERS[0]
    assert paddle[f"{layer}.lora.down.weight"].shape == (5, 2) and paddle[f"{layer}.lora.up.weight"].shape == (2, 7)
    assert torch[f"{layer}.lora.down.weight"].shape == (2, 5)
    assert np.array_equal(torch[f"{layer}.lora.up.weight"], 2 * lora()[layer].up), "alpha / rank is 2"
    assert f"{LAYERS[3]}.lora_linear_layer.down.weight" in torch
    name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q"
    assert np.array_equal(kohya[f"{name}.lora_up.weight"], lora()[layer].up) and kohya[f"{name}.alpha"] == 4
    assert "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight" in kohya
    assert kohya["lora_unet_up_blocks_1_resnets_2_conv_shortcut.lora_down.weight"].shape == (2, 5, 3, 3)
    assert read_tensors(tmp_path / "ppdiffusers")[1]["format"] == "pd"
    assert read_tensors(tmp_path / "diffusers")[1]["format"] == "pt"


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_stays_what_it_is(tmp_path, dtype):
    write_lora(tmp_path / "a.safetensors", lora(alpha=4.0, dtype=dtype), "kohya")
    for name in FILES:
        target = tmp_path / f"{name}.safetensors"
        main(["convert-lora", str(tmp_path / "a.safetensors"), "--to", name, "--output", str(target)])
        arrays = read_tensors(target)[0]
        is_widened = name == "ppdiffusers" and dtype == ml_dtypes.bfloat16  # its reader stops at bfloat16
        expected = np.dtype(np.float32 if is_widened else dtype)
        assert {array.dtype for key, array in arrays.items() if not key.endswith(".alpha")} == {expected}
        assert_same_effect(read_lora(target), lora(alpha=4.0, dtype=dtype))


@pytest.mark.parametrize("size, alpha", [(1e-3, 1.0), (4e4, 8.0), (1.0, 3.0)])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_no_alpha_costs_precision(tmp_path, dtype, size, alpha):
    random = np.random.default_rng(0)
    down, up = (random.uniform(size / 2, size, shape).astype(dtype) for shape in ((4, 5), (7, 4)))
    original = {LAYERS[0]: Update(down, up, alpha)}
    write_lora(tmp_path / "a.safetensors", original, "kohya")
    for name in FILES:
        main(["convert-lora", str(tmp_path / "a.safetensors"), "--to", name, "--output", str(tmp_path / name)])
        assert np.allclose(effect(read_lora(tmp_path / name / FILES[name])[LAYERS[0]]), effect(original[LAYERS[0]]))
    file = tmp_path / "resized.safetensors"
    main(["lora", "resize", str(tmp_path / "a.safetensors"), "--rank=5", "--to=diffusers", "--output", str(file)])
    assert np.allclose(effect(read_lora(file)[LAYERS[0]]), effect(original[LAYERS[0]]))


def test_layers_of_two_text_encoders_are_told_apart(tmp_path):
    updates = {
        f"{encoder}.text_model.encoder.layers.0.mlp.fc1": Update(np.ones((1, 2), "float32"), np.ones((2, 1), "float32"))
        for encoder in ("text_encoder", "text_encoder_2")
    }
    write_lora(tmp_path / "a.safetensors", updates, "kohya")
    assert {key.split("_text_model")[0] for key in read_tensors(tmp_path / "a.safetensors")[0]} == {
        "lora_te1",
        "lora_te2",
    }
    assert read_lora(tmp_path / "a.safetensors").keys() == updates.keys()


def test_names_of_the_peft_library_are_read(tmp_path):
    arrays = {
        f"{LAYERS[0]}.lora_A.weight": np.ones((2, 5), "float32"),
        f"{LAYERS[0]}.lora_B.weight": np.ones((7, 2), "float32"),
    }
    write_tensors(tmp_path / "a.safetensors", arrays, {})
    assert read_lora(tmp_path / "a.safetensors")[LAYERS[0]].rank == 2


@given(st.lists(st.sampled_from([*WORDS, "0", "12"]), min_size=1, max_size=8))
def test_kohya_names_can_be_read_back(words):
    """Whatever the words: no two layers get names that read alike."""
    layer = ".".join(["unet", "down_blocks", "0", *words])
    try:
        name = kohya_name(layer, has_second_encoder=False)
    except Exception as error:
        assert "Kandinsky" in str(error)
        return
    back = from_kohya_name("file", name)
    assert back.replace(".", "_") == layer.replace(".", "_")


shapes = st.lists(st.integers(0, 3), max_size=5)


@given(shapes, shapes, shapes, st.sampled_from(["lora_unet_mid_block_attentions_0_proj_in", LAYERS[0]]), st.booleans())
def test_any_shapes_give_an_update_or_a_line(tmp_path_factory, down, up, alpha, layer, is_kohya):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    names = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
    arrays = {f"{layer}.{name}.weight": np.ones(shape, "float32") for name, shape in zip(names, (down, up))}
    write_tensors(file, {**arrays, f"{layer}.alpha": np.ones(alpha, "float32")}, {})
    try:
        (update,) = read_lora(file).values()
    except UserError as error:
        assert any(words in str(error) for words in ("no rank in common", "expected a number", "rank cannot be told"))
        return
    assert update.down.shape[0] == update.up.shape[1] == update.rank > 0 and update.alpha == 1


SQUARE = "unet.mid_block.attentions.0.proj_in"
KOHYA, DOTTED = SQUARE.replace(".", "_").replace("unet", "lora_unet", 1), SQUARE


@pytest.mark.parametrize(
    "layer, ends, metadata, down, up, expected",
    [
        (KOHYA, ("lora_down", "lora_up"), {}, (9, 4), (4, 9), 9),
        (KOHYA, ("lora_down", "lora_up"), {"format": "pd"}, (4, 4), (4, 4), 4),
        (KOHYA, ("lora_down", "lora_up"), {}, (3, 8), (8, 4), "no rank in common"),
        (f"base_model.model.{DOTTED[5:]}", ("lora_A", "lora_B"), {}, (9, 4), (4, 9), 9),
        (DOTTED, ("lora_A", "lora_B"), {"format": "pt"}, (9, 4), (4, 9), 9),
        (DOTTED, ("lora.down", "lora.up"), {"format": "pd"}, (4, 9), (9, 4), 9),
        (DOTTED, ("lora.down", "lora.up"), {"format": "pt"}, (4, 9), (9, 5), "no rank in common"),
        (DOTTED, ("lora.down", "lora.up"), {}, (2, 4), (4, 2), 2),
        (DOTTED, ("lora.down", "lora.up"), {}, (4, 2), (2, 4), 2),
        (DOTTED, ("lora.down", "lora.up"), {}, (4, 4), (4, 4), "rank cannot be told"),
        (DOTTED, ("lora.down", "lora.up"), {}, (3, 8), (8, 4), "rank cannot be told"),
    ],
)
def test_names_and_metadata_say_the_layout_and_only_then_shapes(tmp_path, layer, ends, metadata, down, up, expected):
    file, random = tmp_path / "a.safetensors", np.random.default_rng(0)
    arrays = {f"{layer}.{end}.weight": random.standard_normal(shape) for end, shape in zip(ends, (down, up))}
    write_tensors(file, arrays, metadata)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read_lora(file)
        return
    (update,), (one, other) = read_lora(file).values(), arrays.values()
    assert update.rank == expected
    is_torch = one.shape[0] == expected and metadata.get("format") != "pd" or layer == KOHYA
    assert np.allclose(effect(update), other @ one if is_torch else (one @ other).T)


@pytest.mark.parametrize("other", [(2, 3, 5), (3, 2, 3)])
def test_the_layers_of_a_file_have_one_layout(tmp_path, other):
    rank, inner, outer = other  # a second layer, in torch's layout
    shapes = {DOTTED: ((9, 4), (4, 9)), LAYERS[0]: ((rank, inner), (outer, rank))}
    ends = ("lora.down", "lora.up")
    arrays = {f"{n}.{e}.weight": np.ones(shape, "f") for n, pair in shapes.items() for e, shape in zip(ends, pair)}
    write_tensors(tmp_path / "a.safetensors", arrays, {})
    with pytest.raises(UserError, match="rank cannot be told"):  # rank 9 of 4 x 4 is no likely one, 4 does not fit both
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "key, layer",
    {
        "base_model.model.conv_in.lora_A.weight": "unet.conv_in",
        "base_model.model.mid_block.attentions.0.to_q.lora_A.default.weight": "unet.mid_block.attentions.0.to_q",
        "transformer_blocks.3.attn.add_q_proj.lora_A.weight": "transformer.transformer_blocks.3.attn.add_q_proj",
        "unet.mid_block.attn1.processor.to_out_lora.down.weight": "unet.mid_block.attn1.to_out.0",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": LAYERS[3].replace("3", "0"),
        "text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.down.weight": LAYERS[3],
        "prior.transformer_blocks.0.attn1.to_q.lora.down.weight": "unet.transformer_blocks.0.attn1.to_q",
        "lora_unet_time_embed_2.lora_down.weight": "unet.time_embedding.linear_2",
    }.items(),
)
def test_each_way_to_name_a_layer_is_read(tmp_path, key, layer):
    back = key.replace("lora_A", "lora_B").replace("down", "up")
    write_tensors(tmp_path / "a.safetensors", {key: np.ones((2, 5), "f"), back: np.ones((7, 2), "f")}, {})
    assert list(read_lora(tmp_path / "a.safetensors")) == [layer]


def test_ranks_that_differ_are_padded_for_diffusers(tmp_path):
    updates = {LAYERS[0]: lora(3.0)[LAYERS[0]], CONV: lora(3.0, rank=4)[CONV]}
    for name in FILES:
        write_lora(tmp_path / name, updates, name)
        found = read_lora(tmp_path / name)
        assert_same_effect(found, updates)
        assert {update.rank for update in found.values()} == ({4} if name == "diffusers" else {2, 4})


def test_mistakes_get_one_line_and_status_two(tmp_path, capsys):
    write_lora(tmp_path / "ok" / FILES["diffusers"], lora(), "diffusers")
    kandinsky = {"unet.down_blocks.1.attentions.0.add_k_proj": Update(np.ones((1, 2)), np.ones((2, 1)))}
    write_lora(tmp_path / "kandinsky.safetensors", kandinsky, "diffusers")
    prior = {"unet.transformer_blocks.1.attn1.to_q": Update(np.ones((1, 2)), np.ones((2, 1)))}
    write_lora(tmp_path / "prior.safetensors", prior, "diffusers")
    write_tensors(tmp_path / "model.safetensors", {"conv_in.weight": np.ones(3)}, {})
    write_tensors(tmp_path / "half.safetensors", {"to_q.lora.down.weight": np.ones((3, 2))}, {})
    write_tensors(
        tmp_path / "sd.safetensors",
        {f"lora_unet_double_blocks_1.lora_{p}.weight": np.ones((2, 2)) for p in ("down", "up")},
        {},
    )
    ones = np.ones((1, 2), "f"), np.ones((2, 1), "f")
    broken = {"nan": (ones[0] * np.nan, ones[1]), "whole": (ones[0], np.int32(ones[1])), "huge": (ones[0], ones[1] * 9)}
    for name, pair in broken.items():
        write_tensors(
            tmp_path / f"{name}.safetensors",
            {f"{CONV}.lora.{end}.weight": part for end, part in zip(("down", "up"), pair)}
            | ({f"{CONV}.alpha": np.float32(3e38)} if name == "huge" else {}),
            {"format": "pt"},
        )
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    ok = tmp_path / "ok"
    cases = {
        (tmp_path / "empty", "kohya", tmp_path): "has none of paddle_lora_weights.safetensors, pytorch_lora",
        (tmp_path / "missing.safetensors", "kohya", tmp_path): "missing.safetensors' does not exist; expected a LoRA",
        (tmp_path / "text.safetensors", "kohya", tmp_path): "text.safetensors: cannot be read as safetensors",
        (tmp_path / "model.safetensors", "kohya", tmp_path): "conv_in.weight is no part of a LoRA",
        (tmp_path / "half.safetensors", "kohya", tmp_path): "to_q has no up matrix",
        (
            tmp_path / "sd.safetensors",
            "diffusers",
            tmp_path,
        ): "is not a layer of a UNet or text encoder",
        (
            tmp_path / "kandinsky.safetensors",
            "kohya",
            tmp_path,
        ): "no program reads the kohya layout of Kandinsky's UNet",
        (tmp_path / "prior.safetensors", "kohya", tmp_path): "the kohya layout is for UNets",
        (ok, "diffusers", ok): "exists; expected a new folder or file",
        (ok, "kohya", tmp_path / "prior.safetensors"): "exists; expected a new folder or file",
        (tmp_path / "nan.safetensors", "diffusers", tmp_path): "conv_shortcut has NaN or inf; expected finite",
        (tmp_path / "whole.safetensors", "diffusers", tmp_path): "conv_shortcut has int32; expected finite",
        (tmp_path / "huge.safetensors", "diffusers", tmp_path): "conv_shortcut would be NaN or inf as float32",
        (ok, "onnx", ok): "argument --to: invalid choice: 'onnx'",
    }
    for (source, to, output), expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(["convert-lora", str(source), "--to", to, "--output", str(output)])
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and expected in last, (source, last)
