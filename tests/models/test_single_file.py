import ppdiffusers_train  # noqa: F401

import collections
import json
import pickle
import shutil

import numpy as np
import pytest

from ppdiffusers_train.cli import main
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.sdxl import SDXLFolder
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder
from ppdiffusers_train.tensor_files import cast_files, read_tensors, write_tensors
from tests.conftest import last_error, weights

UNET = "model.diffusion_model."


def convert(source, to, output, config=None):
    main(
        ["convert", str(source), "--to", to, f"--output={output}", *([f"--single_file_config={config}"] * bool(config))]
    )
    return output


@pytest.fixture(scope="module")
def sdxl_file(sdxl, tmp_path_factory):
    """The tiny SDXL as a single file."""
    return convert(sdxl, "single_file", tmp_path_factory.mktemp("single") / "sdxl.safetensors")


@pytest.fixture
def changed(sdxl_file, tmp_path):
    """`changed(tensors, without="start")` is a copy of that file with more or other tensors."""

    def write(tensors, without=None, name="changed.safetensors"):
        kept = {key: tensor for key, tensor in read_tensors(sdxl_file)[0].items() if not key.startswith(without or "-")}
        write_tensors(tmp_path / name, {**kept, **tensors}, {})
        return tmp_path / name

    return write


def assert_same_folders(one, other):
    """Both have the same files; those with weights the same tensors, to the bit and in the same types."""
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".safetensors":
            left, right = read_tensors(one / file)[0], read_tensors(other / file)[0]
            assert left.keys() == right.keys()
            wrong = [key for key in left if left[key].dtype != right[key].dtype or (left[key] != right[key]).any()]
            assert not wrong, (file, wrong)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_folder_that_became_a_file_comes_back_unchanged_in_both_layouts(family, request, tmp_path, capsys):
    source = shutil.copytree(request.getfixturevalue(family), tmp_path / "ppdiffusers")
    cast_files(source / "vae", "float16")
    file = convert(source, "single_file", tmp_path / "one.safetensors")
    assert_same_folders(source, convert(file, "ppdiffusers", tmp_path / "back", source))
    torch = convert(source, "diffusers", tmp_path / "torch")
    cast_files(torch / "vae", "bfloat16")
    file = convert(torch, "single_file", tmp_path / "other")
    assert_same_folders(torch, convert(file, "diffusers", tmp_path / "torch_back", torch))
    assert f"{tmp_path}/other/model.safetensors: " in capsys.readouterr().out


def test_names_and_shapes_are_those_of_the_original_layout(sdxl_file, sd3, tmp_path):
    found = {name: list(tensor.shape) for name, tensor in read_tensors(sdxl_file)[0].items()}
    expected = {
        f"{UNET}input_blocks.1.0.in_layers.2.weight": [16, 16, 3, 3],
        f"{UNET}input_blocks.2.0.op.weight": [16, 16, 3, 3],
        f"{UNET}output_blocks.1.2.conv.weight": [32, 32, 3, 3],
        f"{UNET}label_emb.0.0.weight": [64, 80],
        "first_stage_model.decoder.mid.attn_1.q.weight": [16, 16, 1, 1],
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [8, 16, 1, 1],
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [32],
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight": [96, 32],
        "conditioner.embedders.1.model.text_projection": [32, 32],
    }
    assert {name: found.get(name) for name in expected} == expected
    found = read_tensors(convert(sd3, "single_file", tmp_path / "sd3.safetensors"))[0]
    assert found[f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"].shape == (96, 32)
    assert f"{UNET}joint_blocks.1.context_block.attn.proj.weight" not in found  # the last block ends the text
    assert "text_encoders.t5xxl.transformer.shared.weight" in found


def test_stable_diffusion_2_is_told_by_its_text_encoder(sd, tmp_path, capsys):
    source = shutil.copytree(sd, tmp_path / "sd2")
    config = source / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    file = convert(source, "single_file", tmp_path / "sd2.safetensors")
    assert "sd2.safetensors: without the last layer of the text encoder" in capsys.readouterr().out
    tensors, metadata = read_tensors(file)
    start = "cond_stage_model.model.transformer.resblocks."
    last = {name.replace(f"{start}1.", f"{start}2."): array for name, array in tensors.items() if f"{start}1." in name}
    assert len(last) == 12
    write_tensors(file, {**tensors, **last, "cond_stage_model.model.logit_scale": np.float32(4.6)}, metadata)
    assert_same_folders(source, convert(file, "ppdiffusers", tmp_path / "back", source))
    assert "Stable Diffusion 2.x" in capsys.readouterr().out


def test_a_file_says_what_its_model_predicts(sdxl, sdxl_file, changed, tmp_path, capsys):
    source = shutil.copytree(sdxl, tmp_path / "v")
    config = source / "scheduler" / "scheduler_config.json"
    settings = {**json.loads(config.read_text()), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config.write_text(json.dumps(settings))
    file = convert(source, "single_file", tmp_path / "v.safetensors")
    assert "which other programs have; set them to v-prediction" in capsys.readouterr().out
    tensors, metadata = read_tensors(file)
    assert {"v_pred", "ztsnr"} <= tensors.keys() and metadata["modelspec.prediction_type"] == "v"
    assert_same_folders(source, convert(file, "ppdiffusers", tmp_path / "back", source))
    marked = changed({"v_pred": np.zeros(0, "float32")})  # as other programs write it, without metadata
    wrong = ((file, sdxl, "v_prediction"), (marked, sdxl, "v_prediction"), (sdxl_file, source, "epsilon"))
    for named, config, words in wrong:
        with pytest.raises(UserError, match=f"says that it predicts {words}"):
            SDXLFolder(named, None, "--x", single_file_config=config)


def test_names_of_older_transformers_are_read(sd, tmp_path):
    file = convert(sd, "single_file", tmp_path / "sd.safetensors")
    tensors, metadata = read_tensors(file)
    start = "cond_stage_model.transformer."
    older = {name.replace(f"{start}text_model.", start): tensor for name, tensor in tensors.items()}
    assert older.keys() != tensors.keys()
    write_tensors(file, older, metadata)
    assert_same_folders(sd, convert(file, "ppdiffusers", tmp_path / "back", sd))


class Hostile:
    """An object whose reading by Python makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


class ModelCheckpoint:
    """Stands for a class whose name Lightning's files hold."""


def test_a_ckpt_is_read_and_nothing_in_it_is_run(sdxl, sdxl_file, tmp_path, capsys):
    content = {"state_dict": read_tensors(sdxl_file)[0], "global_step": 7, "callbacks": {}}
    (tmp_path / "good.ckpt").write_bytes(pickle.dumps(content, protocol=2))
    assert_same_folders(sdxl, convert(tmp_path / "good.ckpt", "ppdiffusers", tmp_path / "out", sdxl))
    kept = {ModelCheckpoint: {"best": 0.5}, "counts": collections.defaultdict(int, a=1)}
    (tmp_path / "pickled.safetensors").write_bytes(pickle.dumps({**content, "callbacks": kept}, protocol=2))
    (tmp_path / "named.ckpt").write_bytes(sdxl_file.read_bytes())
    for name in ("pickled.safetensors", "named.ckpt"):
        assert_same_folders(
            sdxl, convert(tmp_path / name, "ppdiffusers", tmp_path / f"from-{name.split('.')[0]}", sdxl)
        )
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({**content, "callbacks": Hostile(tmp_path / "ran")}, protocol=2))
    with pytest.raises(SystemExit) as ended:
        convert(tmp_path / "bad.ckpt", "ppdiffusers", tmp_path / "bad", sdxl)
    assert ended.value.code == 2 and "cannot be read as pickled weights" in last_error(capsys)
    assert not (tmp_path / "ran").exists()


def test_what_trainers_leave_in_a_file_is_left_out_and_said(changed, sdxl, tmp_path, capsys):
    start = "conditioner.embedders.0.transformer."
    extras = {
        f"{start}text_model.embeddings.position_ids": np.arange(77)[None],
        "model_ema.decay": np.float32(0.999),
        "model_ema.diffusion_modelinput_blocks00weight": np.zeros((2, 2), "float32"),
        "alphas_cumprod": np.ones(1000, "float32"),
        "denoiser.sigmas": np.ones(1000, "float32"),
        "embedding_manager.weight": np.zeros(2, "float32"),
    }
    assert_same_folders(sdxl, convert(changed(extras), "ppdiffusers", tmp_path / "out", sdxl))
    printed = capsys.readouterr().out
    assert "left out 2 moving averages (EMA)" in printed
    assert "left out 1 tensors that are no part of it, such as embedding_manager.weight" in printed


def test_training_from_a_single_file_gives_the_bits_of_training_from_the_folder(train_sdxl, sdxl, sdxl_file, tmp_path):
    from_folder = train_sdxl("sdxl", out="from_folder")
    flags = [f"--pretrained_model_name_or_path={sdxl_file}", f"--single_file_config={sdxl}"]
    single = train_sdxl("sdxl", *flags, "--save_format=single_file", out="single")
    assert [path.name for path in single.glob("*.safetensors")] == ["model.safetensors"]
    back = convert(single, "ppdiffusers", tmp_path / "back", sdxl)
    for part in ("unet", "vae"):
        one, other = weights(back, part), weights(from_folder, part)
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    again = train_sdxl("lora_sdxl", f"--pretrained_model_name_or_path={single}", flags[1], out="lora")
    assert (again / "paddle_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("start", ["first_stage_model.", ""])
def test_a_vae_of_a_single_file(sdxl, sdxl_file, tmp_path, start):
    found = {
        f"{start}{name.removeprefix('first_stage_model.')}": 2 * array
        for name, array in read_tensors(sdxl_file)[0].items()
        if name.startswith("first_stage_model.")
    }
    write_tensors(tmp_path / "vae.safetensors", found, {})
    folder = SDXLFolder(sdxl, tmp_path / "vae.safetensors", "--pretrained_model_name_or_path")
    expected = weights(sdxl, "vae")
    loaded = {name: tensor.numpy() for name, tensor in folder.load("vae").state_dict().items()}
    assert all(np.array_equal(loaded[name], 2 * expected[name]) for name in expected)
    folder.export(tmp_path / "out", {}, "ppdiffusers")
    assert np.array_equal(weights(tmp_path / "out", "vae")["encoder.conv_in.weight"], loaded["encoder.conv_in.weight"])


@pytest.mark.parametrize(
    "name, what",
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "a LoRA"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        (f"{UNET}input_blocks.1.1.time_stack.0.norm1.weight", "Stable Video Diffusion"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        (f"{UNET}joint_blocks.0.x_block.attn.ln_q.weight", "Stable Diffusion 3.5"),
        ("conditioner.embedders.0.model.ln_final.weight", "the refiner"),
        ("down_blocks.0.resnets.0.conv1.weight", "one model of a pipeline's folder"),
        ("edm_mean", "Playground 2.5"),
        ("clip_g", "an embedding of textual inversion"),
        ("first_stage_model.decoder.conv_in.weight", "a VAE alone"),
        ("nothing.known", "of an unknown kind: its first tensor is nothing.known"),
    ],
)
def test_other_files_are_refused_by_name(name, what, sdxl, tmp_path, capsys):
    write_tensors(tmp_path / "other.safetensors", {name: np.zeros((2, 2), "float32")}, {})
    with pytest.raises(SystemExit) as ended:
        convert(tmp_path / "other.safetensors", "ppdiffusers", tmp_path / "out", sdxl)
    assert ended.value.code == 2
    assert f"SOURCE: '{tmp_path}/other.safetensors' is {what}" in last_error(capsys)
    assert not (tmp_path / "out").exists()


def refused(*arguments, **options):
    with pytest.raises(UserError) as error:
        SDXLFolder(*arguments, **options).load("unet")
    return str(error.value)


def test_a_base_that_is_another_kind_or_not_whole_is_refused(changed, sdxl, sd, sdxl_file, tmp_path, capsys):
    flag, config = "--pretrained_model_name_or_path", {"single_file_config": sdxl}
    wide = np.zeros((16, 9, 3, 3), "float32")
    inpainting = changed({f"{UNET}input_blocks.0.0.weight": wide})
    assert "is an inpainting model: its UNet has 9 input channels" in refused(inpainting, None, flag, **config)
    unknown = changed({f"{UNET}middle_block.7.weight": wide})
    assert "has middle_block.7.weight in its unet" in refused(unknown, None, flag, **config)
    sizes = changed({f"{UNET}input_blocks.1.0.in_layers.0.weight": np.zeros(8, "float32")})
    assert "down_blocks.0.resnets.0.norm1.weight is [8], expected [16]" in refused(sizes, None, flag, **config)
    incomplete = changed({}, without=f"{UNET}time_embed")
    assert "time_embedding.linear_1.bias" in refused(incomplete, None, flag, **config)
    message = refused(sdxl_file, None, flag, single_file_config=sd)
    assert "--single_file_config" in message
    with pytest.raises(UserError, match="is a file of Stable Diffusion XL; expected one of Stable Diffusion 1.x or"):
        StableDiffusionFolder(sdxl_file, None, flag, single_file_config=sdxl)
    odd = changed({f"{UNET}input_blocks.0.0.weight": np.zeros(4, "float32")})
    assert "conv_in.weight is [4]" in refused(odd, None, flag, **config)
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    with pytest.raises(UserError, match="to_q.weight is .*expected .16, 16."):
        SDXLFolder(changed({name: np.zeros((16, 16, 3, 3), "float32")}), None, flag, **config).load("vae")
    no_vae = changed({}, without="first_stage_model.")
    bare = shutil.copytree(sdxl, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="has no vae; expected --pretrained_vae_model_name_or_path, or --single"):
        SDXLFolder(no_vae, None, flag, single_file_config=bare).load("vae")
    capsys.readouterr()
    assert SDXLFolder(no_vae, None, flag, single_file_config=sdxl).load("vae")
    assert f"has no vae; that of {sdxl} is used" in capsys.readouterr().out
    with pytest.raises(UserError, match="'none.safetensors' is not a file"):
        SDXLFolder("none.safetensors", None, flag)


def test_only_jobs_that_write_a_pipeline_write_single_files(train_sdxl, train, capsys):
    for run, name in ((train_sdxl, "lora_sdxl"), (train, "decoder")):
        with pytest.raises(SystemExit) as ended:
            run(name, "--save_format=single_file")
        assert ended.value.code == 2 and "--save_format: invalid choice: 'single_file'" in last_error(capsys)


def test_a_pipeline_without_such_a_layout_and_an_output_that_exists_are_refused(kandinsky, sdxl, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert(kandinsky[0], "single_file", tmp_path / "prior.safetensors")
    assert "KandinskyV22PriorPipeline has no single-file layout" in last_error(capsys)
    torch = convert(kandinsky[0], "diffusers", tmp_path / "torch")
    assert_same_folders(kandinsky[0], convert(torch, "ppdiffusers", tmp_path / "back"))
    with pytest.raises(SystemExit):
        convert(sdxl, "diffusers", torch)
    assert f"--output: '{torch}' exists" in last_error(capsys)
    with pytest.raises(SystemExit):
        main(["lora", "merge", "--base", str(torch / "model_index.json"), "--lora=x", f"--output={tmp_path}/y"])
    assert "is a file; expected a folder, as ppdiffusers-train convert makes" in last_error(capsys)


@pytest.mark.parametrize("to", ["single_file", "diffusers", "ppdiffusers"])
def test_weights_that_are_not_finite_are_not_converted(to, changed, sdxl, tmp_path, capsys):
    """Those of a VAE's decoder, too, which training does not look at."""
    name = "first_stage_model.decoder.conv_out.bias"
    spoilt = changed({name: np.array([0, np.nan, 0], "float32")})
    folder = shutil.copytree(sdxl, tmp_path / "base")
    file = folder / "vae" / "diffusion_paddle_model.safetensors"
    tensors, metadata = read_tensors(file)
    write_tensors(file, tensors | {"decoder.conv_out.bias": np.array([0, 0, np.inf], "float16")}, metadata)
    for source, config in ((spoilt, sdxl), (folder, None)):
        with pytest.raises(SystemExit) as ended:
            convert(source, to, tmp_path / "out", config)
        assert ended.value.code == 2 and not (tmp_path / "out").exists()
        assert "SOURCE: vae: decoder.conv_out.bias has values that are NaN or inf" in last_error(capsys)
