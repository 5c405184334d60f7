"""`ppdiffusers-train lora merge`, `extract`, `resize` and `inspect`, on whole pipelines of every family."""

import ppdiffusers_train  # noqa: F401

import json
import os
import shutil
import tracemalloc
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import paddle
import ppdiffusers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppdiffusers_train.cli import main as cli
from ppdiffusers_train.models.kandinsky2_2 import KandinskyFolders
from ppdiffusers_train.models.lora import load_lora
from ppdiffusers_train.models.lora_files import Update, read_lora, write_lora
from ppdiffusers_train.models.lora_libraries import FILES
from ppdiffusers_train.models.lora_merge import WholePipeline
from ppdiffusers_train.models.lora_svd import low_rank, matrix_of, norm_of, resized
from ppdiffusers_train.models.sd3 import SD3Folder
from ppdiffusers_train.models.sdxl import SDXLFolder
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder
from ppdiffusers_train.tensor_files import as_array, cast_files, open_tensors, read_tensors, write_tensors
from tests.conftest import last_error, no_file_above, same
from tests.distributed.kill_harness import end, start

pytestmark = pytest.mark.once  # files, but for `load_lora`, which test_lora_init.py tries, too

# {family: (part, what files call it, ends of its layers)}
FAMILIES = {
    "sd": ("unet", "unet", ("to_k", "to_out.0", "proj_in", "conv1", "downsamplers.0.conv")),
    "sdxl": ("unet", "unet", ("to_k", "ff.net.2", "conv2", "time_emb_proj")),
    "sd3": ("transformer", "transformer", ("to_q", "add_k_proj")),
    "decoder": ("unet", "unet", ("to_q", "add_v_proj", "conv2", "conv_shortcut")),
    "prior": ("prior", "unet", ("to_q", "to_out.0", "ff.net.2")),
}


@pytest.fixture(scope="session")
def bases(sd, sdxl, sd3, kandinsky):
    """{family: the folder of its tiny pipeline}."""
    return {"sd": sd, "sdxl": sdxl, "sd3": sd3, "prior": kandinsky[0], "decoder": kandinsky[1]}


@pytest.fixture(scope="session")
def torch_bases(sd, sdxl, sd3, kandinsky, tmp_path_factory):
    """The same in torch's layout; Kandinsky's two are one combined pipeline."""
    root = tmp_path_factory.mktemp("torch")
    for name, kind in (("sd", StableDiffusionFolder), ("sdxl", SDXLFolder), ("sd3", SD3Folder)):
        (root / name).mkdir()
        kind({"sd": sd, "sdxl": sdxl, "sd3": sd3}[name], None, "--base").export(root / name, {}, "diffusers")
    (root / "combined").mkdir()
    KandinskyFolders(kandinsky[1], kandinsky[0]).export_combined(root / "combined", {}, "diffusers")
    names = {"sd": "sd", "sdxl": "sdxl", "sd3": "sd3", "prior": "combined", "decoder": "combined"}
    return {family: root / name for family, name in names.items()}


def part_of(folder, family):
    """The part of a pipeline that a family's LoRAs are for; Kandinsky's combined pipelines have another name."""
    part = FAMILIES[family][0]
    return part if (folder / part).is_dir() else f"prior_{part}"


def model_of(folder, part):
    """A part of a pipeline, as a user loads it."""
    entry = json.loads((folder / "model_index.json").read_text())[part]
    is_torch = WholePipeline(folder, "").is_torch(part)
    return getattr(ppdiffusers, entry[1]).from_pretrained(str(folder), subfolder=part, from_diffusers=is_torch)


def matrices_of(folder, part):
    """{layer: matrix or kernel in torch's layout}."""
    pipeline = WholePipeline(folder, "")
    return {name: as_array(tensor) for name, tensor in pipeline.tensors(part).items()}


def random_lora(folder, family, file, library="ppdiffusers", rank=3, alpha=6.0, seed=0, size=0.1):
    """Write a LoRA for a pipeline, that changes it a lot."""
    _, component, ends = FAMILIES[family]
    random, updates = np.random.default_rng(seed), {}
    for name, tensor in matrices_of(folder, part_of(folder, family)).items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and any(layer.endswith(f".{end}") for end in ends):
            kernel = tensor.shape[1:]
            down = random.normal(0, size, (rank, *kernel)).astype("float32")
            up = random.normal(0, size, (len(tensor), rank, *[1] * (len(kernel) - 1))).astype("float32")
            updates[f"{component}.{layer}"] = Update(down, up, alpha)
    assert {end for end in ends if any(layer.endswith(end) for layer in updates)} == set(ends)
    write_lora(file, updates, library)
    return file


def parameters_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def answer_of(model, family):
    """The output of a model for fixed inputs."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return paddle.to_tensor(random.standard_normal(shape).astype("float32"))

    model.eval()
    with paddle.no_grad():
        if family == "prior":
            width = model.config.embedding_dim
            return model(normal(2, width), 5, normal(2, width), normal(2, 77, width)).predicted_image_embedding.numpy()
        if family == "sd3":
            config = model.config
            pooled = normal(2, config.pooled_projection_dim)
            text = normal(2, 4, config.joint_attention_dim)
            return model(normal(2, config.in_channels, 16, 16), text, pooled, paddle.to_tensor([5, 9])).sample.numpy()
        width, conditions = model.config.cross_attention_dim, None
        if family == "decoder":
            conditions = {"image_embeds": normal(2, 64)}
        if family == "sdxl":
            conditions = {"text_embeds": normal(2, width // 2), "time_ids": normal(2, 6)}
        text = None if family == "decoder" else normal(2, 5, width)
        return model(normal(2, 4, 16, 16), 5, text, added_cond_kwargs=conditions).sample.numpy()


def merge(base, output, *loras):
    cli(["lora", "merge", "--base", str(base), "--lora", *map(str, loras), "--output", str(output)])
    return output


@pytest.mark.parametrize("library", ["ppdiffusers", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_pipeline_answers_as_the_base_with_the_lora(bases, torch_bases, tmp_path, family, library):
    base = (bases if library == "ppdiffusers" else torch_bases)[family]
    part = part_of(base, family)
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    one = random_lora(base, family, tmp_path / "a:b" / FILES["diffusers"], "diffusers")
    merged = merge(base, tmp_path / "merged", one)
    model = model_of(base, part)
    plain = answer_of(model, family)
    load_lora(model, one)
    expected, found = answer_of(model, family), answer_of(model_of(merged, part), family)
    assert np.abs(expected - plain).max() > 1e-2 * np.abs(plain).max()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert before == {file: file.read_bytes() for file in before}, "the base is as it was"
    assert {path.relative_to(merged) for path in merged.rglob("*")} == {
        path.relative_to(base) for path in base.rglob("*")
    }


def test_several_loras_add_up_with_their_scales(bases, tmp_path):
    base, file = bases["sdxl"], "x.safetensors"
    first = random_lora(base, "sdxl", tmp_path / "a:2" / FILES["kohya"], "kohya")
    second = random_lora(base, "sdxl", tmp_path / "b" / file, "diffusers", rank=5, alpha=None, seed=1)
    merged = merge(base, tmp_path / "merged", f"{tmp_path / 'a:2'}:-0.5", f"{second}:2", first)
    before, after = matrices_of(base, "unet"), matrices_of(merged, "unet")
    one, other = (read_lora(path, layers_per_block=1) for path in (first, second))
    for name, array in before.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        change = 0
        if layer in one:
            change = 0.5 * matrix_of(one[layer]) + 2 * matrix_of(other[layer])
            change = change.reshape(array.shape)
        assert np.allclose(after[name], array + change, atol=1e-6), name


def test_what_was_trained_in_full_is_merged_too(bases, train, tmp_path, capsys):
    flags = ["--trainable_modules=conv_in,time_embedding.linear_1", "--learning_rate=1e-2"]
    for library in ("ppdiffusers", "diffusers"):
        out = train("decoder_lora", *flags, f"--save_format={library}", out=library)
        merged = merge(bases["decoder"], tmp_path / f"merged-{library}", out)
        assert " layers and 4 tensors that were trained in full, times 1" in capsys.readouterr().out
        model = model_of(bases["decoder"], "unet")
        load_lora(model, out)
        expected, found = answer_of(model, "decoder"), answer_of(model_of(merged, "unet"), "decoder")
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        assert not np.array_equal(
            matrices_of(merged, "unet")["conv_in.bias"], matrices_of(bases["decoder"], "unet")["conv_in.bias"]
        )
    result = json.loads((out / "result.json").read_text())
    del result["files"]["trainable_modules.safetensors"]
    (out / "result.json").write_text(json.dumps(result))
    merge(bases["decoder"], tmp_path / "stale", out)
    assert "trained in full" not in capsys.readouterr().out, "the file is of another run"


def test_dtype_shards_and_files_are_the_bases(bases, tmp_path):
    base = shutil.copytree(bases["sd"], tmp_path / "base")
    cast_files(base / "unet", "bfloat16")
    (whole,) = (base / "unet").glob("*.safetensors")
    arrays, metadata = read_tensors(whole)
    names = sorted(arrays)
    shards = {f"{whole.stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, own in shards.items():
        write_tensors(base / "unet" / shard, {name: arrays[name] for name in own}, metadata)
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (base / "unet" / f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()
    lora = random_lora(base, "sd", tmp_path / "lora.safetensors")
    merged = merge(base, tmp_path / "merged", lora)
    for shard, own in shards.items():
        found, kept = open_tensors(merged / "unet" / shard)
        assert sorted(found) == sorted(own) and kept == metadata
        assert {tensor.dtype for tensor in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert not same(matrices_of(base, "unet"), matrices_of(merged, "unet"))


def test_a_difference_is_extracted_and_merged_back(bases, tmp_path, capsys):
    base, tuned = bases["sdxl"], shutil.copytree(bases["sdxl"], tmp_path / "tuned")
    random = np.random.default_rng(0)
    for part in ("unet", "text_encoder"):
        (file,) = (tuned / part).glob("*.safetensors")
        arrays, metadata = read_tensors(file)
        changed = {n: a + random.normal(0, 0.02, a.shape).astype(a.dtype) for n, a in arrays.items() if a.ndim > 1}
        write_tensors(file, {**arrays, **changed}, metadata)
    words = ["lora", "extract", "--base", str(base), "--tuned", str(tuned)]
    cli([*words, "--rank", "9999", "--output", str(tmp_path / "full"), "--to", "diffusers"])
    said = capsys.readouterr().out
    assert "not held: 2 tensors that differ, such as text_encoder.text_model.embeddings.p" in said
    merged = merge(base, tmp_path / "merged", tmp_path / "full")
    for part in ("unet", "text_encoder"):
        back, wanted = matrices_of(merged, part), matrices_of(tuned, part)
        held = [name for name in wanted if "embeddings" not in name]
        assert max(np.abs(back[name] - wanted[name]).max() for name in held) < 1e-6
    cli([*words, "--rank", "4", "--output", str(tmp_path / "r4.safetensors"), "--lora_target_modules", "conv1,to_q"])
    one, other = matrices_of(base, "unet"), matrices_of(tuned, "unet")
    updates = read_lora(tmp_path / "r4.safetensors")
    assert {layer.split(".")[-1] for layer in updates} == {"conv1", "to_q"}
    for layer, update in updates.items():
        name = f"{layer.removeprefix('unet.')}.weight"
        difference = (other[name] - one[name]).reshape(len(one[name]), -1)
        discarded = np.linalg.svd(difference.astype("float64"), compute_uv=False)[4:]
        assert np.linalg.norm(difference - matrix_of(update)) == pytest.approx(np.linalg.norm(discarded), rel=1e-5)


sizes = st.integers(1, 9)


@settings(max_examples=40)
@given(sizes, sizes, sizes, sizes, st.sampled_from([None, 0.5, 7.0]), st.booleans(), st.integers(0, 99))
def test_another_rank_is_the_nearest_or_the_same(out, width, rank, other, alpha, is_conv, seed):
    random = np.random.default_rng(seed)
    shapes = ((rank, width, 3, 3), (out, rank, 1, 1)) if is_conv else ((rank, width), (out, rank))
    update = Update(*(random.standard_normal(shape).astype("float32") for shape in shapes), alpha)
    matrix = matrix_of(update).astype("float64")
    found, lost = resized(update, other)
    values = np.linalg.svd(matrix, compute_uv=False)
    error, whole = np.linalg.norm(values[other:]), np.linalg.norm(values)
    assert found.rank == other and found.shape == update.shape
    assert np.linalg.norm(matrix_of(found) - matrix) == pytest.approx(error, rel=1e-4, abs=1e-5 * whole)
    assert lost == pytest.approx(error / whole, rel=1e-4, abs=1e-5) and norm_of(update) == pytest.approx(
        whole, rel=1e-5
    )
    down, up, error = low_rank(matrix, other)
    assert np.allclose(down @ down.T, np.eye(len(down)), atol=1e-6)
    assert np.linalg.norm(up @ down - matrix) == pytest.approx(error, abs=1e-6 * whole + 1e-9)


def test_resize_keeps_what_a_larger_rank_computes(bases, tmp_path, capsys):
    file = random_lora(bases["sd3"], "sd3", tmp_path / "a.safetensors", "diffusers")
    for rank in (2, 8):
        cli(["lora", "resize", str(file), "--rank", str(rank), "--output", str(tmp_path / str(rank))])
    said = capsys.readouterr().out
    assert (
        "of rank 2, before 3" in said and "truncated by SVD: at most" in said and "the LoRA computes the same" in said
    )
    before, after = read_lora(file), read_lora(tmp_path / "8" / FILES["ppdiffusers"])
    assert all(np.allclose(matrix_of(before[n]), matrix_of(after[n]), atol=1e-7) for n in before)
    assert {update.rank for update in after.values()} == {8} and {u.alpha for u in after.values()} == {16.0}


def test_inspect_tells_what_a_file_is(bases, train, tmp_path, capsys):
    out = train("prior_lora", "--lora_rank=3", "--lora_alpha=6", "--trainable_modules=proj_in")
    capsys.readouterr()
    cli(["lora", "inspect", str(out), "--base", str(bases["prior"])])
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["fits"] == "the prior of Kandinsky 2.2" and said["base"].endswith(": prior")
    assert (said["rank"], said["alpha"], said["layout"]) == ("3", "6", "ppdiffusers")
    assert said["trained in full"] == "unet.proj_in.bias, unet.proj_in.weight" and "--lora_rank 3" in said["flags"]
    expected = {
        "sd": "reads text embeddings of width",
        "sdxl": "a UNet that",
        "sd3": "Stable Diffusion 3",
        "decoder": "decoder",
    }
    for family, words in expected.items():
        library = "kohya" if family == "sdxl" else "diffusers"
        file = random_lora(bases[family], family, tmp_path / f"{family}.safetensors", library)
        cli(["lora", "inspect", str(file), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert words in found["fits"] and found["ranks"].keys() == {"3"} and found["alphas"].keys() == {"6"}
        assert found["layout"].startswith(library)
        updates = read_lora(file)
        assert all(
            norm == pytest.approx(np.linalg.norm(matrix_of(updates[n])), rel=1e-5) for n, norm in found["norms"].items()
        )


@pytest.mark.parametrize("tool", ["merge", "convert to a folder", "convert to a file"])
def test_a_kill_during_a_merge_or_a_conversion_leaves_nothing_half_done(bases, tmp_path, tool):
    """It is killed at several moments after the output is begun; the same command then writes it whole."""
    base, target = bases["sdxl"], tmp_path / "out" / ("all.safetensors" if tool.endswith("a file") else "whole")
    words = ["convert", str(base), "--to", "single_file" if tool.endswith("a file") else "diffusers"]
    if tool == "merge":
        words = ["lora", "merge", "--base", str(base)]
        words += ["--lora", str(random_lora(base, "sdxl", tmp_path / "lora.safetensors"))]
    cli([*words, "--output", str(tmp_path / target.name)])
    expected, before, killed = contents(tmp_path / target.name), contents(base), 0
    for files in (0, 0, 1, 8):
        (process,) = start(SimpleNamespace(main=cli), [*words, "--output", str(target)], 1, tmp_path / "log")
        is_done = end([process], 60, lambda files=files: count_files(target.parent) > files)
        killed += not is_done and not target.exists()
        assert not target.exists() or contents(target) == expected
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    assert killed >= 1
    cli([*words, "--output", str(target)])
    assert contents(target) == expected and [path.name for path in target.parent.iterdir()] == [target.name]
    assert contents(base) == before


def contents(path):
    """{a file's name below a path: its bytes}."""
    return {str(file.relative_to(path)): file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}


def count_files(folder):
    """The files below a folder, which may be removed at any time."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def test_a_full_disk_ends_a_merge_in_one_line(bases, tmp_path, capsys):
    lora = random_lora(bases["sd"], "sd", tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit) as stopped, no_file_above(2**12):
        merge(bases["sd"], tmp_path / "out" / "merged", lora)
    assert stopped.value.code == 1 and "--output: the pipeline cannot be written to" in last_error(capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_merge_needs_memory_for_one_tensor(tmp_path):
    """20 tensors of 4 MB, with a LoRA on each, of a class that is not ppdiffusers' and so may have any tensors."""
    size, count, (base, lora) = 1000, 20, (tmp_path / "base", tmp_path / "lora.safetensors")
    (base / "unet").mkdir(parents=True)
    (base / "unet" / "config.json").write_text("{}")
    (base / "model_index.json").write_text(json.dumps({"unet": ["own", "OwnUNet"]}))
    names = [f"down_blocks.{number}.attentions.0.proj_in" for number in range(count)]
    matrix = np.random.default_rng(0).standard_normal((size, size)).astype("float32")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    write_tensors(file, {f"{name}.weight": matrix for name in names}, {"format": "pt"})
    update = Update(matrix[:8], matrix[:, :8])
    write_lora(lora, {f"unet.{name}": update for name in names}, "diffusers")
    tracemalloc.start()
    merged = merge(base, tmp_path / "merged", lora)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * matrix.nbytes, f"{peak / matrix.nbytes:.1f} tensors"
    assert np.allclose(matrices_of(merged, "unet")[f"{names[-1]}.weight"], matrix + matrix_of(update), rtol=1e-5)
    half = shutil.copytree(base, tmp_path / "half")
    cast_files(half, "float16")
    with pytest.raises(SystemExit):
        merge(half, tmp_path / "overflow", f"{lora}:1e6")
    assert not (tmp_path / "overflow").exists()


def with_conv_in(base, target, change):
    """A copy of a pipeline whose conv_in.weight is NaN, missing, or doubled."""
    (file,) = (shutil.copytree(base, target) / "unet").glob("*.safetensors")
    arrays, metadata = read_tensors(file)
    weight = arrays.pop("conv_in.weight")
    changed = {"nan": weight * np.nan, "twice": weight * 2}.get(change)
    write_tensors(file, arrays if changed is None else {**arrays, "conv_in.weight": changed}, metadata)
    return str(target)


def test_mistakes_get_one_line_and_leave_nothing(bases, tmp_path, capsys):
    lora = random_lora(bases["sdxl"], "sdxl", tmp_path / "lora.safetensors")
    wide = {"unet.mid_block.attentions.0.proj_in": Update(np.ones((1, 3), "float32"), np.ones((3, 1), "float32"))}
    write_lora(tmp_path / "wide.safetensors", wide, "diffusers")
    (tmp_path / "there").mkdir()
    new, there = str(tmp_path / "new"), str(tmp_path / "there")
    base, other = str(bases["sdxl"]), str(bases["prior"])
    nan, lacking, twice = (with_conv_in(bases["sdxl"], tmp_path / name, name) for name in ("nan", "lacking", "twice"))
    shape = matrices_of(bases["sdxl"], "unet")["conv_in.weight"].shape
    conv = {"unet.conv_in": Update(np.ones((1, *shape[1:]), "float32"), np.ones((shape[0], 1, 1, 1), "float32"))}
    write_lora(conv_file := tmp_path / "conv.safetensors", conv, "diffusers")
    differ = ("extract", "--base", base, "--tuned", twice, "--rank=2", "--output", new)
    cases = {
        ("merge", "--base", base, "--lora", str(lora), "--output", there): "exists; expected a new folder",
        ("merge", "--base", base, "--lora", str(lora), "--output", f"{new}.safetensors"): "is a file's name or within",
        ("merge", "--base", base, "--lora", str(lora), "--output", f"{base}/new"): "is a file's name or within --base",
        ("merge", "--base", other, "--lora", str(lora), "--output", new): "which prior of the base does not have",
        ("merge", "--base", base, "--lora", str(tmp_path / "wide.safetensors"), "--output", new): "fits another base",
        ("merge", "--base", base, "--lora", f"{lora}:nan", "--output", new): "expected a finite number",
        ("merge", "--base", base, "--lora", f"{lora}:half", "--output", new): "half' does not exist; expected a LoRA",
        ("merge", "--base", there, "--lora", str(lora), "--output", new): "it has no model_index.json",
        ("extract", "--base", base, "--tuned", base, "--rank=2", "--output", new): "has the same weights as the base",
        ("extract", "--base", base, "--tuned", other, "--rank=2", "--output", new): "is of another model",
        ("extract", "--base", base, "--tuned", nan, "--rank=2", "--output", new): "NaN or inf in unet.conv_in.weight",
        (*differ, "--lora_target_modules", "nosuch"): "--lora_target_modules: none of the layers that differ ends with",
        ("extract", "--base", lacking, "--tuned", base, "--rank=2", "--output", new): "conv_in.weight is missing",
        ("merge", "--base", nan, "--lora", str(conv_file), "--output", new): "--base: conv_in.weight has NaN or inf",
        ("resize", there, "--rank=2", "--output", new): "PATH: ",
        ("resize", str(lora), "--rank=2", "--output", there): "exists; expected a new folder",
        ("resize", str(lora), "--rank=100000000", "--output", new): "is more than any layer",
        ("inspect", str(lora), "--base", other): "which prior of the base does not have",
    }
    for words, expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            cli(["lora", *words])
        last = last_error(capsys)
        assert stopped.value.code == 2 and "error: " in last and expected in last, (words, last)
        assert not os.path.exists(new) and os.listdir(there) == [], words


def without_weights(part):
    for file in part.glob("*.safetensors"):
        file.unlink()


def as_fp16(part):
    for file in part.glob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))


def without_a_tensor(part):
    (file,) = part.glob("*.safetensors")
    tensors, metadata = read_tensors(file)
    tensors.pop(sorted(tensors)[0])
    write_tensors(file, tensors, metadata)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_weights, "has no weights in "),
        (as_fp16, "only --variant fp16"),
        (without_a_tensor, "is missing (1 of "),
    ],
)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_base_with_a_part_that_is_not_whole_is_refused_by_every_command(
    bases, tmp_path, capsys, part, damage, expected
):
    lora = random_lora(bases["sd"], "sd", tmp_path / "lora.safetensors")
    base, whole, new = shutil.copytree(bases["sd"], tmp_path / "base"), str(bases["sd"]), str(tmp_path / "new")
    damage(base / part)
    commands = [
        ["lora", "merge", "--base", str(base), "--lora", str(lora), "--output", new],
        ["lora", "extract", "--base", whole, "--tuned", str(base), "--rank=2", "--output", new],
        ["lora", "extract", "--base", str(base), "--tuned", whole, "--rank=2", "--output", new],
        *(["convert", str(base), "--to", to, "--output", new] for to in ("diffusers", "ppdiffusers", "single_file")),
    ]
    for words in commands:
        with pytest.raises(SystemExit) as stopped:
            cli(words)
        last = last_error(capsys)
        assert stopped.value.code == 2 and expected in last and f"/{part}" in last.replace(f"in {part}/", f"/{part}")
        assert not os.path.exists(new), words
    if damage is as_fp16:
        cli(["convert", str(base), "--to", "diffusers", "--output", new, "--variant", "fp16"])
        assert list((tmp_path / "new" / part).glob("*.safetensors"))
