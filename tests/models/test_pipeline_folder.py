import ppdiffusers_train  # noqa: F401

import shutil

import numpy as np
import paddle
import pytest
from ppdiffusers import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    UNet2DConditionModel,
    VQModel,
)
from ppdiffusers.transformers import CLIPTokenizer, CLIPVisionModelWithProjection
from safetensors import safe_open

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.hub_folders import files_to_download
from ppdiffusers_train.models.pipeline_folder import PipelineFolder, link_tree
from ppdiffusers_train.models.weights import FILES, load_in_place, save_model
from ppdiffusers_train.tensor_files import read_tensors, write_tensors
from tests.conftest import weights


@pytest.fixture(scope="module")
def diffusers_folders(kandinsky, tmp_path_factory):
    """The tiny Kandinsky as diffusers writes it: weights in torch's layout, those of the UNet and the prior divided."""
    folders = []
    for source, pipeline in zip(kandinsky, (KandinskyV22PriorPipeline, KandinskyV22Pipeline)):
        target = tmp_path_factory.mktemp("diffusers") / source.name
        pipe = pipeline.from_pretrained(str(source))
        pipe.save_pretrained(str(target), to_diffusers=True)
        for part in {"unet", "prior"} & pipe.components.keys():
            save_model(pipe.components[part], target / part, "diffusers", largest_file=100_000)
            assert len(list((target / part).glob("*-of-*"))) > 1
        folders.append(target)
    return folders


def folder(path, *parts, **options):
    return PipelineFolder(path, "--pretrained_x", list(parts), **options)


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_the_layout_is_seen_from_the_files(kandinsky, diffusers_folders):
    for (prior, decoder), is_torch in ((kandinsky, False), (diffusers_folders, True)):
        assert folder(decoder, "unet", "movq", "scheduler").is_torch("unet") == is_torch
        assert folder(prior, "image_encoder").is_torch("image_encoder") == is_torch
        assert folder(prior, "tokenizer").is_torch("tokenizer") is False


@pytest.mark.parametrize(
    "part, part_class, index", [("unet", UNet2DConditionModel, 1), ("image_encoder", CLIPVisionModelWithProjection, 0)]
)
def test_both_layouts_load_the_same_weights(kandinsky, diffusers_folders, part, part_class, index):
    one, other = (arrays(folder(f[index], part).load(part, part_class)) for f in (kandinsky, diffusers_folders))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_training_from_diffusers_folders_writes_a_pipeline_for_ppdiffusers(train_decoder, kandinsky, diffusers_folders):
    prior, decoder = diffusers_folders
    flags = [f"--pretrained_decoder_model_name_or_path={decoder}", f"--pretrained_prior_model_name_or_path={prior}"]
    from_diffusers = train_decoder(*flags, out="from_diffusers")
    from_paddle = train_decoder(out="from_paddle")
    for part in ("unet", "movq", "prior_prior"):
        one, other = weights(from_diffusers, part), weights(from_paddle, part)
        assert all(np.array_equal(one[name], other[name]) for name in other), part
    assert not list(prior.rglob("*.pdparams")) + list(from_diffusers.rglob("*.pdparams")), "nothing is pickled"
    pipe = KandinskyV22CombinedPipeline.from_pretrained(str(from_diffusers))
    assert pipe("a cat", num_inference_steps=1, prior_num_inference_steps=2, height=64, width=64).images[0].size == (
        64,
        64,
    )


def test_of_several_kinds_of_weights_the_export_has_the_one_that_was_loaded(kandinsky, diffusers_folders, tmp_path):
    both = shutil.copytree(kandinsky[1], tmp_path / "both")
    torch_weights = "diffusion_pytorch_model.safetensors"
    shutil.copy(diffusers_folders[1] / "movq" / torch_weights, both / "movq")
    folder(both, "movq").export("movq", VQModel, tmp_path / "out", "ppdiffusers")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "diffusion_paddle_model.safetensors"}


def test_a_converted_part_keeps_its_type(kandinsky, tmp_path):
    movq = VQModel.from_pretrained(str(kandinsky[1] / "movq"))
    movq.to(dtype="float16")
    movq.save_pretrained(str(tmp_path / "half" / "movq"), to_diffusers=True)
    shutil.copy(kandinsky[1] / "model_index.json", tmp_path / "half")
    folder(tmp_path / "half", "movq").export("movq", VQModel, tmp_path / "out", "ppdiffusers")
    with safe_open(tmp_path / "out" / "diffusion_paddle_model.safetensors", "np") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}
        assert all(np.array_equal(tensors.get_tensor(name), value) for name, value in arrays(movq).items())


def test_pickled_weights_are_loaded_and_exported_as_safetensors(kandinsky, tmp_path):
    """A result holds no pickles: other programs would run what they say."""
    pickled = shutil.copytree(kandinsky[1], tmp_path / "pickled")
    shutil.rmtree(pickled / "unet")
    unet = UNet2DConditionModel.from_pretrained(str(kandinsky[1] / "unet"))
    unet.save_pretrained(str(pickled / "unet"), safe_serialization=False)
    (pickled / "unet" / "optimizer.ckpt").write_bytes(b"")
    loaded = folder(pickled, "unet").load("unet", UNet2DConditionModel)
    assert all(np.array_equal(value, arrays(loaded)[name]) for name, value in arrays(unet).items())
    for layout, name in FILES.items():
        folder(pickled, "unet").export("unet", UNet2DConditionModel, tmp_path / layout, layout)
        assert {path.name for path in (tmp_path / layout).iterdir()} == {"config.json", name}
    written = read_tensors(tmp_path / "ppdiffusers" / FILES["ppdiffusers"])[0]
    assert all(np.array_equal(value, written[name]) for name, value in arrays(unet).items())


@pytest.mark.once
def test_an_alias_finds_a_part_of_a_combined_pipeline(tmp_path, kandinsky):
    combined = shutil.copytree(kandinsky[1], tmp_path / "combined")
    shutil.copytree(kandinsky[0] / "prior", combined / "prior_prior")
    assert folder(combined, "prior", aliases={"prior": "prior_prior"}).config("prior")["embedding_dim"] == 64


def test_weights_that_cannot_be_loaded_are_named(kandinsky, tmp_path):
    cut = shutil.copytree(kandinsky[1], tmp_path / "cut")
    file = cut / "unet" / "diffusion_paddle_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="--pretrained_x: '.*cut' has a unet/ that cannot be loaded"):
        folder(cut, "unet").load("unet", UNet2DConditionModel)


@pytest.mark.once
def test_of_a_repository_only_one_kind_of_weights_is_downloaded():
    files = [
        "model_index.json", "README.md", "unet/config.json", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/config.json", "text_encoder/pytorch_model.bin", "tokenizer/vocab.json", "vae/config.json",
    ]  # fmt: skip
    assert sorted(files_to_download(files, ["unet", "text_encoder", "tokenizer"])) == [
        "model_index.json", "text_encoder/config.json", "text_encoder/pytorch_model.bin", "tokenizer/vocab.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    paddle_too = [*files, "unet/model_state.pdparams"]
    assert "unet/model_state.pdparams" in files_to_download(paddle_too, ["unet"])
    assert "unet/diffusion_pytorch_model.safetensors" not in files_to_download(paddle_too, ["unet"])


@pytest.mark.once
def test_of_a_repository_the_wanted_variant_is_downloaded_where_there_is_one():
    files = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert sorted(files_to_download(files, ["unet", "vae"], "fp16")) == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_variant_s_weights_are_those_that_are_loaded_and_exported(kandinsky, tmp_path):
    both = shutil.copytree(kandinsky[1], tmp_path / "both")
    plain, half = (both / "unet" / f"diffusion_paddle_model{middle}.safetensors" for middle in ("", ".fp16"))
    arrays_of_file, metadata = read_tensors(plain)
    write_tensors(half, {name: (2 * array).astype("float16") for name, array in arrays_of_file.items()}, metadata)
    for variant, factor in ((None, 1), ("fp16", 2)):
        loaded = arrays(folder(both, "unet", variant=variant).load("unet", UNet2DConditionModel))
        assert all(np.allclose(loaded[name], factor * arrays_of_file[name], rtol=1e-3, atol=1e-6) for name in loaded)
        assert all(array.dtype == np.float32 for array in loaded.values())
    folder(both, "unet", variant="fp16").export("unet", UNet2DConditionModel, tmp_path / "out", "ppdiffusers")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", plain.name}
    assert (tmp_path / "out" / plain.name).samefile(half)


@pytest.mark.once
def test_linking_copies_where_the_disk_cannot_link(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")

    def refuse(*_):
        raise OSError

    monkeypatch.setattr("os.link", refuse)
    link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").read_text() == "x" and not (tmp_path / "b" / "x").samefile(tmp_path / "a" / "x")


@pytest.mark.parametrize("save_format", ["ppdiffusers", "diffusers"])
def test_a_result_has_no_code_and_no_pickle_that_lay_beside_a_model(kandinsky, tmp_path, save_format):
    base = shutil.copytree(kandinsky[0], tmp_path / "base")
    (base / "tokenizer" / "more").mkdir()
    left_out = ("tokenizer.py", "fast.so", "state.pkl", "more/also.py")
    for name in (*left_out, "added.json"):
        (base / "tokenizer" / name).write_text("{}")
    folder(base, "tokenizer").export("tokenizer", CLIPTokenizer, tmp_path / "out", save_format)
    copied = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "added.json" in copied and not copied & {name.split("/")[-1] for name in left_out}


def test_loading_in_place_keeps_the_parameter_objects(kandinsky):
    unet = UNet2DConditionModel.from_pretrained(str(kandinsky[1] / "unet"))
    parameter, value = unet.conv_in.weight, unet.conv_in.weight.numpy()
    with paddle.no_grad():
        parameter.set_value(paddle.zeros_like(parameter))
    load_in_place(unet, kandinsky[1] / "unet")
    assert unet.conv_in.weight is parameter and np.array_equal(parameter.numpy(), value)


def test_weights_of_another_model_are_refused(kandinsky):
    movq = VQModel.from_pretrained(str(kandinsky[1] / "movq"))
    with pytest.raises(UserError, match="is of another model: .* differences"):
        load_in_place(movq, kandinsky[1] / "unet")
