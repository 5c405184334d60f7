"""Bases whose weights are not those of their models, or are more than weights: one line, and nothing is trained."""

import ppdiffusers_train  # noqa: F401

import contextlib
import json
import pickle
import shutil

import numpy as np
import pytest
from ppdiffusers import AutoencoderKL, UNet2DConditionModel
from ppdiffusers.transformers import CLIPTextModel, T5EncoderModel

from ppdiffusers_train.cli import main
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.kandinsky2_2 import DECODER_PARTS, PRIOR_PARTS, KandinskyFolders
from ppdiffusers_train.models.pipeline_folder import ModelFolder, PipelineFolder
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder
from ppdiffusers_train.models.weights import FILES, save_model
from ppdiffusers_train.tensor_files import read_tensors, write_tensors
from ppdiffusers_train.toy.models.t5 import build_t5
from tests.conftest import last_error, same
from tests.pickles.hostile import older, payloads, torch_tensor, zipped

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


def pipeline(directory, part, **options):
    return PipelineFolder(directory, "--pretrained_x", [part], **options)


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def rewrite(sd, tmp_path):
    """`rewrite("unet", layout, change)` is a base whose part has `change({name: array})` for its weights."""

    def rewritten(part, layout, change):
        base = shutil.copytree(sd, tmp_path / "base")
        save_model(pipeline(sd, part).load(part, CLASSES[part]), base / part, layout)
        (file,) = (base / part).glob("*.safetensors")
        content, metadata = read_tensors(file)
        changed = change(content)
        write_tensors(file, content if changed is None else changed, metadata)
        return base

    return rewritten


def peft(content):
    """As diffusers writes a model whose LoRA layers are fused, but not unloaded."""
    for name in [name for name in content if ".attn1.to_q.weight" in name]:
        layer = name.removesuffix(".weight")
        content[f"{layer}.base_layer.weight"] = content.pop(name)
        for matrix, shape in (("lora_A", (4, 16)), ("lora_B", (16, 4))):
            content[f"{layer}.{matrix}.default.weight"] = np.zeros(shape, "float32")


def own_lora(content):
    """As ppdiffusers writes a model that carries LoRA layers: all of its own weights are there."""
    layer = next(name for name in content if name.endswith("attn1.to_q.weight")).removesuffix(".weight")
    content[f"{layer}.lora_layer.down.weight"] = np.zeros((16, 4), "float32")


def larger(content):
    content["conv_in.weight"] = np.zeros((16, 9, 3, 3), "float32")


def another(content):
    return {"a.weight": np.zeros(3), "b.weight": np.zeros(3)}


def without_a_bias(content):
    del content["conv_in.bias"]


def wrapped(content):
    return {f"_orig_mod.{name}": array for name, array in content.items()}


ATTACHED = "a LoRA is still attached to this model; .*fuse_lora"
WRONG = {
    "a LoRA of peft": (peft, rf"to_q\.weight is missing, .* tensors\): {ATTACHED}"),
    "a LoRA of ppdiffusers": (own_lora, rf"to_q\.lora_layer\.down\.weight is unknown \(1 of .*: {ATTACHED}"),
    "a wrapper": (wrapped, "inside a wrapper; remove '_orig_mod' from the"),
    "more channels": (larger, r"conv_in\.weight is \[16, 9, 3, 3\], expected \[16, 4, 3, 3\] \(1 of .*another size"),
    "a missing tensor": (without_a_bias, r"conv_in\.bias is missing \(1 .*a part of the weights"),
    "another model": (another, r"conv_in\.bias is missing, .*, … \(\d+ of .*the weights are those of another model"),
    "a layer more": (lambda c: c.update({"conv_new.bias": np.zeros(3)}), r"conv_new\.bias is unknown \(1 of"),
}


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_are_not_the_model_s_are_refused_with_what_that_means(rewrite, wrong, layout):
    change, message = WRONG[wrong]
    base = rewrite("unet", layout, change)
    with pytest.raises(UserError, match=f"--pretrained_x: .*{FILES[layout]} does not fit a UNet2D.*{message}"):
        pipeline(base, "unet").load("unet", UNet2DConditionModel)


def with_value(value):
    """A change that sets all values of the first tensor."""
    return lambda content: content.update({min(content): np.full_like(content[min(content)], value)})


BAD_NUMBERS = {
    "NaN": (with_value(np.nan), "has values that are NaN or inf"),
    "inf": (with_value(np.inf), "has values that are NaN or inf"),
    "integers": (lambda c: c.update({min(c): c[min(c)].astype("int32")}), "as int32; expected floating-point"),
    "a layer more": (lambda c: c.update({"extra.weight": np.zeros(3, "float32")}), r"extra\.weight is unknown"),
}


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("wrong", BAD_NUMBERS)
def test_weights_that_are_no_numbers_or_of_no_layer_are_refused_by_name(rewrite, wrong, part):
    change, message = BAD_NUMBERS[wrong]
    with pytest.raises(UserError, match=f"--pretrained_x: .*{part}.*{message}"):
        pipeline(rewrite(part, "diffusers", change), part).load(part, CLASSES[part])


def edited(file, change):
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


UNUSABLE = {
    (
        "model_index.json",
        "scheduler",
        ("diffusers", "NoSuchScheduler"),
    ): "class 'NoSuchScheduler'; expected a scheduler",
    ("model_index.json", "scheduler", ("os", "system")): "class 'system'; expected a scheduler of ppdiffusers",
    ("scheduler/scheduler_config.json", "prediction_type", "foo"): "prediction_type 'foo'; expected one of epsilon",
    ("vae/config.json", "scaling_factor", "x"): "scaling_factor 'x'; expected a number above 0",
    ("vae/config.json", "shift_factor", "x"): "shift_factor 'x'; expected a number",
}


@pytest.mark.parametrize("setting", UNUSABLE)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_loaded(sd, kandinsky, tmp_path, setting):
    name, key, value = setting
    base = shutil.copytree(sd, tmp_path / "base")
    edited(base / name, lambda content: content.update({key: value}))
    with pytest.raises(UserError, match=f"--base: .*{UNUSABLE[setting]}"):
        StableDiffusionFolder(base, None, "--base")
    if not name.startswith("vae"):
        decoder = shutil.copytree(kandinsky[1], tmp_path / "decoder")
        edited(decoder / name, lambda content: content.update({key: value}))
        with pytest.raises(UserError, match=f"--pretrained_decoder.*{UNUSABLE[setting]}"):
            print(KandinskyFolders(decoder, kandinsky[0]).decoder)


def test_a_scheduler_of_another_family_and_a_vocabulary_without_its_tokens_are_refused(sd, tmp_path, capsys):
    base = shutil.copytree(sd, tmp_path / "base")
    edited(base / "tokenizer" / "vocab.json", lambda content: content.pop("<|endoftext|>"))
    folder = StableDiffusionFolder(base, None, "--base", single_file_config="x")
    assert "--single_file_config has no effect: --base" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--base: .* has a tokenizer/ that cannot be loaded: .*<\|endoftext\|>"):
        folder.load("tokenizer")
    flow = ["ppdiffusers", "FlowMatchEulerDiscreteScheduler"]
    edited(base / "model_index.json", lambda content: content.update(scheduler=flow))
    with pytest.raises(UserError, match="has a FlowMatchEulerDiscreteScheduler; expected one of diffusion"):
        StableDiffusionFolder(base, None, "--base")


def test_matrices_in_the_other_layout_are_named(rewrite):
    base = rewrite("text_encoder", "diffusers", lambda c: {n: a.T if a.ndim == 2 and "embedding" not in n else a
                                                            for n, a in c.items()})  # fmt: skip
    with pytest.raises(UserError, match="its matrices are in the other library's layout"):
        pipeline(base, "text_encoder").load("text_encoder", CLIPTextModel)


def test_what_other_parts_of_an_encoder_hold_is_left_out_in_silence(rewrite, sd, capfd):
    """CLIP's other tower, positions that torch counts, and the prefix of the whole model."""

    def whole(content):
        others = {
            "vision_model.x.weight": np.zeros(3),
            "logit_scale": np.zeros(()),
            "text_projection.weight": np.eye(3),
        }
        prefixed = {f"clip.{name}": array for name, array in content.items()}
        return {**prefixed, **others, "text_model.embeddings.position_ids": np.arange(77)[None]}

    base = rewrite("text_encoder", "diffusers", whole)
    found, expected = (pipeline(folder, "text_encoder").load("text_encoder", CLIPTextModel) for folder in (base, sd))
    assert same(arrays(found), arrays(expected))
    assert "not used" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_the_two_names_of_t5_s_embedding_are_one(tmp_path, capfd, kept):
    """A whole T5, with its decoder, of which the embedding is under either name or both."""
    t5 = build_t5(256, width=32, layers=2, seed=0)
    (tmp_path / "model_index.json").write_text("{}")
    save_model(t5, tmp_path / "t5", "diffusers")
    (file,) = (tmp_path / "t5").glob("*.safetensors")
    content, metadata = read_tensors(file)
    names = {"shared.weight", "encoder.embed_tokens.weight"} - {kept}
    left = {name: array for name, array in content.items() if kept == "both" or name not in names}
    embedding = content[next(iter({*content} & {"shared.weight", "encoder.embed_tokens.weight"}))]
    left |= {kept: embedding} if kept != "both" else {}
    others = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.eye(3), "lm_head.weight": np.eye(3)}
    write_tensors(file, {**left, **others}, metadata)
    capfd.readouterr()
    found = pipeline(tmp_path, "t5").load("t5", T5EncoderModel)
    assert same(arrays(found), arrays(t5))
    printed = "".join(capfd.readouterr())
    assert "embed_tokens" not in printed and "shared" not in printed and "newly" not in printed


def test_a_vae_from_elsewhere_is_compared_as_well(train_sdxl, sdxl, tmp_path, capsys):
    vae = shutil.copytree(sdxl / "vae", tmp_path / "vae")
    (file,) = vae.glob("*.safetensors")
    content, metadata = read_tensors(file)
    del content["decoder.conv_in.bias"]
    write_tensors(file, content, metadata)
    with pytest.raises(SystemExit) as stopped:
        train_sdxl("sdxl", f"--pretrained_vae_model_name_or_path={vae}")
    assert stopped.value.code == 2
    assert (
        "--pretrained_vae_model_name_or_path: " in (line := last_error(capsys)) and "decoder.conv_in.bias is m" in line
    )


@pytest.mark.parametrize(
    "index, part", [(0, "prior"), (0, "image_encoder"), (0, "text_encoder"), (1, "movq"), (1, "unet")]
)
def test_every_part_of_kandinsky_is_compared(kandinsky, tmp_path, index, part):
    base = shutil.copytree(kandinsky[index], tmp_path / "base")
    (file,) = (base / part).glob("*.safetensors")
    content, metadata = read_tensors(file)
    lost = sorted(name for name in content if name.endswith(".bias"))[0]
    write_tensors(file, {name: array for name, array in content.items() if name != lost}, metadata)
    folders = KandinskyFolders(*((base, base) if index else (kandinsky[1], base)))
    folder = folders.decoder if index else folders.prior
    with pytest.raises(UserError, match=f"has a {part}/ that cannot be loaded: .*: {lost} is missing"):
        folder.later(part, {**DECODER_PARTS, **PRIOR_PARTS}[part]).load()


def test_a_pickled_lora_is_converted_and_a_hostile_one_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layer = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    matrices = {
        f"{layer}.lora.down.weight": np.ones((2, 5), "float32"),
        f"{layer}.lora.up.weight": np.ones((7, 2), "f4"),
    }
    (tmp_path / "good.bin").write_bytes(pickle.dumps(matrices, 2))
    (tmp_path / "bad.bin").write_bytes(zipped(TOUCH))
    main(["convert-lora", "good.bin", "--to", "diffusers", "--output", "new.safetensors"])
    assert same(read_tensors("new.safetensors")[0], matrices)
    with pytest.raises(SystemExit) as stopped:
        main(["convert-lora", "bad.bin", "--to", "diffusers", "--output", "newer.safetensors"])
    assert stopped.value.code == 2 and not (tmp_path / "MARKER").exists()
    assert "bad.bin: cannot be read as pickled weights: it holds posix.system, which is no array" in last_error(capsys)


TOUCH = payloads("MARKER")["os.system, protocol 4"]


def divided(folder, first, second):
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, content in zip(names, (first, second)):
        (folder / name).write_bytes(content)
    index = {"metadata": {}, "weight_map": {"w": names[0], "x": names[1]}}
    (folder / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))


NUMBERS = zipped(torch_tensor(4), s0=bytes(16))
HIDDEN = {
    "Paddle's file": lambda folder: (folder / "model_state.pdparams").write_bytes(TOUCH),
    "torch's file": lambda folder: (folder / "diffusion_pytorch_model.bin").write_bytes(zipped(TOUCH)),
    "torch's older file": lambda folder: (folder / "diffusion_pytorch_model.bin").write_bytes(older(TOUCH)),
    "the second file": lambda folder: divided(folder, NUMBERS, zipped(TOUCH)),
    "the name of an encoder's weights": lambda folder: (folder / "pytorch_model.bin").write_bytes(zipped(TOUCH)),
    "safetensors": lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(TOUCH),
    "an index": lambda folder: (folder / "model.safetensors.index.json").write_bytes(TOUCH),
    "a configuration": lambda folder: (folder / "config.json").write_bytes(TOUCH),
}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_no_file_of_a_base_runs_code(sd, tmp_path, monkeypatch, part, hidden):
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(sd, tmp_path / "base")
    for file in (base / part).glob("*.safetensors"):
        file.rename(file.with_name("model.safetensors" if hidden == "a configuration" else "other"))
    HIDDEN[hidden](base / part)
    with pytest.raises(UserError, match=f"--pretrained_x: '.*base' .*{part}"):
        folder = pipeline(base, part)
        folder.later(part, CLASSES[part])
        folder.load(part, CLASSES[part])
    for layout in FILES:
        with contextlib.suppress(UserError):  # raised where weights have to be read
            folder.export(part, CLASSES[part], tmp_path / "out", layout)
            assert not [file for file in (tmp_path / "out").iterdir() if file.suffix in (".bin", ".pdparams")]
    assert not (tmp_path / "MARKER").exists()


def test_a_run_on_a_hostile_base_is_one_line(train_sdxl, sdxl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(sdxl, tmp_path / "base")
    (base / "text_encoder_2" / "model_state.pdparams").write_bytes(TOUCH)  # found before the safetensors beside it
    (base / "text_encoder_2" / "pytorch_model.bin").write_bytes(TOUCH)
    with pytest.raises(SystemExit) as stopped:
        train_sdxl("sdxl", f"--pretrained_model_name_or_path={base}")
    assert stopped.value.code == 2 and not (tmp_path / "MARKER").exists()
    assert "model_state.pdparams: cannot be read as pickled weights: it holds posix.system, " in last_error(capsys)


def test_names_of_old_releases_are_read_from_pickles_as_well(sd, tmp_path):
    base = shutil.copytree(sd, tmp_path / "base")
    vae = pipeline(sd, "vae").load("vae", AutoencoderKL)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    content = {}
    for name, array in arrays(vae).items():
        for today, former in new.items():
            name = name.replace(f".{today}.", f".{former}.")
        content[name] = array
    assert content.keys() != arrays(vae).keys()
    for file in (base / "vae").glob("*.safetensors"):
        file.unlink()
    (base / "vae" / "model_state.pdparams").write_bytes(pickle.dumps(content, 4))
    assert same(arrays(pipeline(base, "vae").load("vae", AutoencoderKL)), arrays(vae))
    folder = ModelFolder(base / "vae", "--vae", "vae", "AutoencoderKL")
    assert same(arrays(folder.load("vae", AutoencoderKL)), arrays(vae))
