"""Weights on disk: in either library's layout, as a variant or not, in one file or divided over several."""

import ppdiffusers_train  # noqa: F401

import itertools
import json
import os
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import paddle
import pytest
from ppdiffusers import AutoencoderKL, PriorTransformer, SD3Transformer2DModel, UNet2DConditionModel
from ppdiffusers.transformers import CLIPTextModelWithProjection, T5EncoderModel

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.hub_folders import files_to_download
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.tensor_files import as_array, cast_files, read_tensors, size_in_bytes, write_tensors
from ppdiffusers_train.toy.models.sd3 import build_transformer
from ppdiffusers_train.toy.models.sdxl import build_vae
from ppdiffusers_train.toy.models.t5 import build_t5
from tests.conftest import same

CLASSES = {
    "unet": UNet2DConditionModel,
    "prior": PriorTransformer,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
WHOLE = 10**10  # bytes; larger than any model here
LAYOUTS = ("ppdiffusers", "diffusers")
# How a variant's files, and their index, are called: by all libraries today, and by diffusers before 0.31.
VARIANTS = {
    "today": ("{stem}.fp16{shard}.safetensors", "{stem}.safetensors.index.fp16.json"),
    "before": ("{stem}{shard}.fp16.safetensors", "{stem}.safetensors.fp16.index.json"),
}


@pytest.fixture(scope="module")
def models(kandinsky):
    """One model of each class. Their weights are random and exact in float16."""
    prior, decoder = kandinsky
    found = {
        "unet": UNet2DConditionModel.from_pretrained(str(decoder / "unet")),
        "prior": PriorTransformer.from_pretrained(str(prior / "prior")),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(str(prior / "text_encoder")),
        "text_encoder_3": build_t5(256, width=32, layers=2, seed=0),
    }
    rng = np.random.default_rng(0)
    for model in found.values():
        for tensor in model.state_dict().values():
            tensor.set_value(rng.standard_normal(tensor.shape).astype("float16").astype("float32"))
    return found


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def names(folder):
    return {path.name for path in folder.iterdir()}


def pipeline(directory, **options):
    return PipelineFolder(
        directory, "--pretrained_x", [path.name for path in directory.iterdir() if path.is_dir()], **options
    )


def a_third(model):
    """So many bytes that a model is divided into three or four files."""
    sizes = [size_in_bytes(tensor) for tensor in model.state_dict().values()]
    return max(sum(sizes) // 3, max(sizes))


def write_base(directory, part, model, layout, variant, divided):
    """A pipeline with one part; a variant is float16, and beside it are weights that are all twice as large."""
    directory.mkdir()
    (directory / "model_index.json").write_text("{}")
    largest = a_third(model) if divided else WHOLE
    save_model(model, directory / part, layout, largest_file=largest)
    if variant:
        half = dict.fromkeys(model.state_dict(), np.dtype("float16"))
        save_model(model, directory / "variant", layout, half, largest_file=largest // 2)
        for file in (directory / part).glob("*.safetensors"):
            content, metadata = read_tensors(file)
            write_tensors(file, {name: 2 * array for name, array in content.items()}, metadata)
        add_variant(directory / "variant", directory / part, *VARIANTS[variant])
        shutil.rmtree(directory / "variant")


def add_variant(source, target, file_pattern, index_pattern):
    renamed = {}
    for file in source.glob("*.safetensors"):
        stem, dash, shard = file.stem.partition("-")
        renamed[file.name] = file_pattern.format(stem=stem, shard=dash + shard)
        file.rename(target / renamed[file.name])
    for index in source.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = {name: renamed[file] for name, file in content["weight_map"].items()}
        (target / index_pattern.format(stem=stem)).write_text(json.dumps(content))


def types(folder):
    return {array.dtype.name for file in folder.glob("*.safetensors") for array in read_tensors(file)[0].values()}


def by_library(folder, part_class, layout):
    """A model as a user of ppdiffusers loads it, from a copy of the folder: the library leaves files in it."""
    copy = shutil.copytree(folder, folder.with_name("copy"))
    options = {"paddle_dtype" if hasattr(part_class, "load_config") else "dtype": "float32"}
    model = part_class.from_pretrained(str(copy), from_diffusers=layout == "diffusers", **options)
    shutil.rmtree(copy)
    return model


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
def test_a_model_is_written_as_its_library_writes_it(models, tmp_path, part, layout, divided):
    model, largest = models[part], a_third(models[part]) if divided else WHOLE
    save_model(model, tmp_path / "ours", layout, largest_file=largest)
    options = {"safe_serialization": True, "to_diffusers": layout == "diffusers"}
    if part.startswith("text") and layout == "diffusers" and divided:
        pytest.skip("ppdiffusers never divides text encoders for torch")
    model.save_pretrained(str(tmp_path / "theirs"), max_shard_size=largest, **options)
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    assert len(names(tmp_path / "ours")) > 3 if divided else len(names(tmp_path / "ours")) == 2
    for file in (tmp_path / "theirs").iterdir():
        ours = tmp_path / "ours" / file.name
        if file.suffix == ".json":
            assert json.loads(ours.read_text()) == json.loads(file.read_text()), file.name
        else:
            (found, metadata), (expected, expected_metadata) = read_tensors(ours), read_tensors(file)
            assert same(found, expected) and metadata == expected_metadata


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_3"])
@pytest.mark.parametrize(
    "layout, variant, divided", list(itertools.product(LAYOUTS, (None, *VARIANTS), (False, True))), ids=str
)
def test_every_form_of_weights_is_loaded_and_exported(models, tmp_path, part, layout, variant, divided):
    expected, base = arrays(models[part]), tmp_path / "base"
    write_base(base, part, models[part], layout, variant, divided)
    before = {path: path.read_bytes() for path in base.rglob("*.*")}
    folder = pipeline(base, variant=variant and "fp16")
    assert folder.is_torch(part) == (layout == "diffusers")
    assert same(arrays(folder.load(part, CLASSES[part])), expected)
    for target in LAYOUTS:
        out = tmp_path / target
        folder.export(part, CLASSES[part], out / part, target)
        assert types(out / part) == {"float16" if variant else "float32"}
        assert (len(names(out / part)) > 3) == (divided and target == layout)
        assert not [name for name in names(out / part) if "fp16" in name]
        assert same(arrays(by_library(out / part, CLASSES[part], target)), expected)
        cast_files(out, "bfloat16")
        (out / "model_index.json").write_text("{}")
        rounded = {name: array.astype(ml_dtypes.bfloat16).astype("float32") for name, array in expected.items()}
        assert types(out / part) == {"bfloat16"}
        assert same(arrays(pipeline(out).load(part, CLASSES[part])), rounded)
        for index in (out / part).glob("*.index.json"):
            sizes = [
                size_in_bytes(array)
                for f in (out / part).glob("*.safetensors")
                for array in read_tensors(f)[0].values()
            ]
            assert json.loads(index.read_text())["metadata"]["total_size"] == sum(sizes)
    assert before == {path: path.read_bytes() for path in base.rglob("*.*")}


def test_a_checkpoint_is_read_back_into_the_same_objects_however_it_is_divided(models, tmp_path):
    """Also where other weights stood before: in another layout, and in more or fewer files."""
    unet, folder = models["unet"], tmp_path / "unet"
    other = UNet2DConditionModel.from_config(unet.config)
    objects = {name: id(tensor) for name, tensor in other.state_dict().items()}
    files = set()
    for layout, before, size in itertools.product(LAYOUTS, (WHOLE, a_third(unet)), (WHOLE, a_third(unet), 100_000)):
        set_to_zero(other)
        save_model(other, folder, layout, largest_file=before)
        files.add(frozenset(names(folder)))
        save_model(unet, folder, largest_file=size)
        load_in_place(other, folder)
        assert same(arrays(other), arrays(unet))
    assert len(files) == 4
    assert objects == {name: id(tensor) for name, tensor in other.state_dict().items()}


def set_to_zero(model):
    for tensor in model.state_dict().values():
        tensor.set_value(paddle.zeros_like(tensor))


def test_what_only_ppdiffusers_has_begins_anew(tmp_path):
    """The published SD3 has no biases in the norms before its last layers: files for diffusers have none either."""
    transformer = build_transformer()
    write_base(tmp_path / "base", "transformer", transformer, "diffusers", None, divided=True)
    assert not [name for name in read_index(tmp_path / "base" / "transformer") if name.endswith("norm.bias")]
    expected = arrays(transformer)
    assert not expected["norm_out.norm.bias"].any()
    assert same(arrays(pipeline(tmp_path / "base").load("transformer", SD3Transformer2DModel)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_that_lacks_a_tensor_is_refused_and_not_filled_with_chance(models, tmp_path, layout):
    write_base(tmp_path / "base", "unet", models["unet"], layout, None, divided=False)
    (file,) = (tmp_path / "base" / "unet").glob("*.safetensors")
    content, metadata = read_tensors(file)
    write_tensors(file, {name: np.array(a) for name, a in content.items() if name != "conv_in.weight"}, metadata)
    with pytest.raises(UserError, match=f"{file.name} does not fit .* conv_in.weight is missing \\(1 of 184 "):
        pipeline(tmp_path / "base").load("unet", UNet2DConditionModel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_result_in_either_layout_is_read_back_in_place(models, tmp_path, layout):
    other = UNet2DConditionModel.from_config(models["unet"].config)
    save_model(models["unet"], tmp_path, layout)
    load_in_place(other, tmp_path)
    assert same(arrays(other), arrays(models["unet"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("saved", ["float16", "bfloat16", "float32"])
def test_a_checkpoint_is_cast_to_the_types_of_the_model(models, tmp_path, dtype, saved):
    text_encoder = models["text_encoder"]
    save_model(text_encoder, tmp_path, dtypes=dict.fromkeys(text_encoder.state_dict(), np.dtype(saved)))
    other = CLIPTextModelWithProjection(text_encoder.config).to(dtype=dtype)
    load_in_place(other, tmp_path)
    for name, tensor in text_encoder.state_dict().items():
        # By NumPy: on processors, Paddle 2.6 cuts off what bfloat16 has no bits for.
        expected = tensor.numpy().astype(saved).astype("float32").astype(dtype)
        found = as_array(other.state_dict()[name])
        assert found.dtype == expected.dtype and np.array_equal(found, expected), name
    save_model(other, tmp_path)
    assert types(tmp_path) == {dtype}


def read_index(folder):
    (index,) = folder.glob("*.index.json")
    return json.loads(index.read_text())["weight_map"]


def edit_index(folder, **changes):
    (index,) = folder.glob("*.index.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


def swapped(weight_map):
    """The map with one tensor in another file."""
    other = next(file for file in weight_map.values() if file != weight_map["conv_in.weight"])
    return {**weight_map, "conv_in.weight": other}


def without(weight_map, name):
    return {other: file for other, file in weight_map.items() if other != name}


STEM = "diffusion_paddle_model"
DAMAGES = {
    "a missing file": (
        lambda folder: next(folder.glob("*-00002-of-*")).unlink(),
        rf"/unet/{STEM}-00002-of-0000\d\.safetensors is missing; {STEM}\.safetensors\.index\.json names it",
    ),
    "no file but the index": (
        lambda folder: [file.unlink() for file in folder.glob("*-of-*")],
        rf"/unet/{STEM}-00001-of-0000\d\.safetensors is missing",
    ),
    "a missing index": (
        lambda folder: next(folder.glob("*.index.json")).unlink(),
        rf"/unet/{STEM}\.safetensors\.index\.json is missing, the index of {STEM}-00001-of-0000\d\.safetensors",
    ),
    "an index of nothing": (
        lambda folder: edit_index(folder, weight_map={}),
        rf"/unet/{STEM}\.safetensors\.index\.json cannot be read as an index of weights: ValueError",
    ),
    "an index that is cut short": (
        lambda folder: next(folder.glob("*.index.json")).write_text('{"metadata"'),
        rf"/unet/{STEM}\.safetensors\.index\.json cannot be read as an index of weights",
    ),
    "a file of other weights": (
        lambda folder: shutil.copy(next(folder.glob("*-00001-of-*")), folder / f"{STEM}.safetensors"),
        rf"/unet/{STEM}\.safetensors is not in {STEM}\.safetensors\.index\.json",
    ),
    "a tensor that is in no file": (
        lambda folder: edit_index(folder, weight_map=read_index(folder) | {"x": read_index(folder)["conv_in.weight"]}),
        rf"/unet/{STEM}-0000\d-of-0000\d\.safetensors does not hold x, as {STEM}\.safetensors\.index\.json says",
    ),
    "a tensor that is in another file": (
        lambda folder: edit_index(folder, weight_map=swapped(read_index(folder))),
        rf"/unet/{STEM}-0000\d-of-0000\d\.safetensors does not hold conv_in.weight, as {STEM}\.safetensors\.index",
    ),
    "a tensor that the index leaves out": (
        lambda folder: edit_index(folder, weight_map=without(read_index(folder), "conv_in.weight")),
        rf"/unet/{STEM}-0000\d-of-0000\d\.safetensors holds conv_in.weight, which {STEM}\.safetensors\.index",
    ),
    "a file that is cut short": (
        lambda folder: os.truncate(next(folder.glob("*-00002-of-*")), 1000),
        rf"/unet/{STEM}-00002-of-0000\d\.safetensors: cannot be read as safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_weights_that_are_not_whole_a_file_is_named(models, tmp_path, damage):
    write_base(tmp_path / "base", "unet", models["unet"], "ppdiffusers", None, divided=True)
    do, message = DAMAGES[damage]
    do(tmp_path / "base" / "unet")
    with pytest.raises(UserError, match=f"^--pretrained_x: '.*base' .*{message}"):
        pipeline(tmp_path / "base").load("unet", UNet2DConditionModel)
    with pytest.raises(UserError, match=f"^/.*{message}"):
        load_in_place(models["unet"], tmp_path / "base" / "unet")


def test_a_folder_without_weights_is_named(models, tmp_path):
    with pytest.raises(UserError, match=rf"/{STEM}\.safetensors is missing$"):
        load_in_place(models["unet"], tmp_path)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_divided_pickled_weights_are_loaded(models, tmp_path, part):
    models[part].save_pretrained(
        str(tmp_path / "base" / part), safe_serialization=False, max_shard_size=a_third(models[part])
    )
    (tmp_path / "base" / "model_index.json").write_text("{}")
    assert len(list((tmp_path / "base" / part).glob("model_state-*.pdparams"))) > 2
    assert same(arrays(pipeline(tmp_path / "base").load(part, CLASSES[part])), arrays(models[part]))


@pytest.mark.parametrize("divided", [False, True])
def test_names_of_old_releases_are_left_to_the_library(tmp_path, divided):
    """An attention's layers were called differently, in files on the hub they still are."""
    vae = build_vae()
    write_base(tmp_path / "base", "vae", vae, "diffusers", None, divided)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(name):
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        return name

    renamed = {rename(name): name for name in vae.state_dict() if rename(name) != name}
    assert len(renamed) == 16
    for file in (tmp_path / "base" / "vae").glob("*.safetensors"):
        content, metadata = read_tensors(file)
        write_tensors(file, {rename(name): array for name, array in content.items()}, metadata)
    for index in (tmp_path / "base" / "vae").glob("*.index.json"):
        edit_index(index.parent, weight_map={rename(name): file for name, file in read_index(index.parent).items()})
    assert same(arrays(pipeline(tmp_path / "base").load("vae", AutoencoderKL)), arrays(vae))


def test_the_host_holds_a_tensor_of_what_is_saved_and_loaded(tmp_path):
    """NumPy's memory: what is read, cast, transposed and written."""
    model = build_t5(256, width=128, layers=20, seed=0)
    sizes = [size_in_bytes(tensor) for tensor in model.state_dict().values()]
    assert 60 * max(sizes) < sum(sizes)
    half = dict.fromkeys(model.state_dict(), np.dtype("float16"))
    write_base(tmp_path / "base", "t5", model, "diffusers", None, divided=False)
    folder = pipeline(tmp_path / "base")
    steps = {
        "save": lambda: save_model(model, tmp_path / "plain"),
        "save for torch": lambda: save_model(model, tmp_path / "torch", "diffusers", half),
        "load in place": lambda: load_in_place(model, tmp_path / "plain"),
        "load": lambda: folder.load("t5", T5EncoderModel),
        "export": lambda: folder.export("t5", T5EncoderModel, tmp_path / "out", "ppdiffusers"),
        "cast": lambda: cast_files(tmp_path / "out", "float16"),
    }
    for name, step in steps.items():
        tracemalloc.start()
        step()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < sum(sizes) / 4, f"{name}: {peak} of {sum(sizes)} bytes"


@pytest.mark.parametrize("part", CLASSES)
def test_an_export_to_the_other_layout_loads_no_model(models, tmp_path, monkeypatch, part):
    """Kandinsky's largest tower is 7.4 GB, beside all that a run still holds when it writes its result."""
    monkeypatch.delattr(PipelineFolder, "load")
    for layout, target in (LAYOUTS, LAYOUTS[::-1]):
        write_base(tmp_path / layout, part, models[part], layout, None, divided=False)
        pipeline(tmp_path / layout).export(part, CLASSES[part], tmp_path / f"for {target}", target)
        assert same(arrays(by_library(tmp_path / f"for {target}", CLASSES[part], target)), arrays(models[part]))


@pytest.mark.once
def test_of_a_repository_divided_weights_are_downloaded_with_their_index():
    files = ["model_index.json", "transformer/config.json", "t5/model.safetensors"]
    for stem, index in (
        ("transformer/diffusion_pytorch_model", "transformer/diffusion_pytorch_model.safetensors.index.json"),
        ("t5/model", "t5/model.safetensors.index.json"),
        ("t5/model.fp16", "t5/model.safetensors.index.fp16.json"),
    ):
        files += [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors", index]
    plain = [name for name in files if "fp16" not in name and name != "t5/model.safetensors"]
    assert sorted(files_to_download(files, ["transformer", "t5"])) == sorted(plain)
    half = [name for name in files if name.startswith(("transformer", "model_index")) or "fp16" in name]
    assert sorted(files_to_download(files, ["transformer", "t5"], "fp16")) == sorted(half)
    # As diffusers wrote them before 0.31.
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    before = [*shards, "unet/diffusion_pytorch_model.safetensors.fp16.index.json"]
    both = [*before, "unet/diffusion_pytorch_model.safetensors"]
    assert sorted(files_to_download(both, ["unet"], "fp16")) == before
    assert files_to_download(both, ["unet"]) == both[-1:]
