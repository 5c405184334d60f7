"""`--init_lora`: a run goes on from a LoRA's file, whatever its format, rank and alpha; and `load_lora`."""

import ppdiffusers_train  # noqa: F401

import shutil

import numpy as np
import paddle
import pytest

from ppdiffusers_train.cli import main as cli
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.lora import load_lora, lora_layers
from ppdiffusers_train.models.lora_files import Update, read_lora, write_lora
from ppdiffusers_train.models.lora_libraries import FILES
from ppdiffusers_train.models.lora_svd import matrix_of
from ppdiffusers_train.module import choose_trainable
from ppdiffusers_train.tensor_files import read_tensors, write_tensors
from tests.conftest import encode, last_error, same, tensors

JOBS = {
    "lora_sdxl": ("build_sdxl_module", "--lora_target_modules=to_q,to_out.0,conv1,ff.net.2", "--train_text_encoder"),
    "lora_sd3": ("build_sd3_module",),
    "prior_lora": ("build",),
    "decoder_lora": ("build", "--lora_target_modules=to_q,add_k_proj,conv_shortcut"),
}
RANK = ("--lora_rank=4", "--lora_alpha=8")


@pytest.fixture
def builder_of(request):
    """`builder_of(name)` builds the module of a LoRA job, `builder_of(name)(*flags)` with more flags."""

    def of(name):
        fixture, *flags = JOBS[name]
        build = request.getfixturevalue(fixture)
        return lambda *more: build(name, *flags, *more)

    return of


def randomized(module, seed=1):
    """A module with LoRA layers that change its answers."""
    random = np.random.default_rng(seed)
    for model in [getattr(module, module.trained), *module.adapted.values()]:
        for lora in lora_layers(model).values():
            lora.up.weight.set_value(random.normal(0, 0.05, lora.up.weight.shape).astype("float32"))
    return module


def loss_of(module, encoded=None):
    """(the loss of two samples at fixed draws, the encoded samples)."""
    module.eval()
    encoded = encoded or encode(module, build_dataset(module.args), [0, 1])
    with paddle.no_grad():
        return float(module(encoded, Draws(0, [0, 1]))), encoded


def initialized(module):
    """(the module after `initialize`, the lines that were printed)."""
    lines = []
    module.initialize(lines.append)
    return module, "\n".join(lines)


@pytest.mark.parametrize("name", JOBS)
def test_the_first_loss_is_the_last_of_the_run_before(builder_of, name, tmp_path):
    build = builder_of(name)
    base, encoded = loss_of(build(*RANK))
    before = randomized(build(*RANK))
    before.save_pretrained(str(tmp_path / "ppdiffusers"))
    expected, _ = loss_of(before, encoded)
    assert abs(expected - base) > 1e-4 * base, "the LoRA changes something"
    formats = ["diffusers", "kohya"] if name == "lora_sdxl" else ["diffusers"]
    for library in formats:
        cli(["convert-lora", str(tmp_path / "ppdiffusers"), "--to", library, "--output", str(tmp_path / library)])
    cases = {"ppdiffusers": RANK, "diffusers": ("--lora_rank=4", "--lora_alpha=3"), "kohya": ("--lora_rank=7",)}
    for library in ["ppdiffusers", *formats]:
        module, said = initialized(build(*cases[library], f"--init_lora={tmp_path / library}"))
        assert loss_of(module, encoded)[0] == pytest.approx(expected, rel=1e-6), library
        assert ("rank 4 -> 7, padded with zeros" in said) == (library == "kohya")


@pytest.mark.once
def test_padded_rows_can_learn_and_a_lower_rank_is_the_nearest(builder_of, tmp_path):
    build = builder_of("decoder_lora")
    before = randomized(build(*RANK))
    before.save_pretrained(str(tmp_path))
    padded, _ = initialized(build("--lora_rank=6", f"--init_lora={tmp_path}"))
    encoded = loss_of(padded)[1]
    padded.train()
    padded(encoded, Draws(0, [0, 1])).backward()
    for lora in lora_layers(padded.unet).values():
        gradient = lora.up.weight.grad.numpy()
        rows = gradient[4:] if gradient.ndim == 2 else gradient[:, 4:]
        assert np.abs(rows).max() > 0
    cut, said = initialized(build("--lora_rank=3", "--lora_alpha=5", f"--init_lora={tmp_path}"))
    cut.save_pretrained(str(tmp_path / "cut"))
    assert "rank 4 -> 3, truncated by SVD; at most " in said
    old, new = (read_lora(folder / FILES["ppdiffusers"]) for folder in (tmp_path, tmp_path / "cut"))
    for layer in old:
        error = np.linalg.norm(matrix_of(old[layer]) - matrix_of(new[layer]))
        discarded = np.linalg.svd(matrix_of(old[layer]), compute_uv=False)[3]
        assert error == pytest.approx(discarded, rel=1e-3, abs=1e-6)


@pytest.mark.once
def test_what_the_file_lacks_and_what_the_run_does_not_train_is_said(builder_of, build_sdxl_module, tmp_path):
    randomized(builder_of("lora_sdxl")(*RANK)).save_pretrained(str(tmp_path))
    more = build_sdxl_module(
        "lora_sdxl", "--lora_target_modules=to_q,to_out.0,conv1,ff.net.2,to_v", f"--init_lora={tmp_path}"
    )
    module, said = initialized(more)
    assert "layers of text_encoder are left out, because this run does not train it" in said
    assert "layers of text_encoder_2 are left out" in said
    missing = [name for name in lora_layers(module.unet) if name.endswith("to_v")]
    assert f"the file lacks {len(missing)} layers, such as {min(missing)}, which start at zero" in said
    assert all(not lora_layers(module.unet)[name].up.weight.numpy().any() for name in missing)
    fewer = build_sdxl_module("lora_sdxl", "--lora_target_modules=to_q,to_out.0,ff.net.2", f"--init_lora={tmp_path}")
    with pytest.raises(
        UserError, match="conv1, which this run does not train; expected --lora_target_modules .*,conv1"
    ):
        initialized(fewer)


@pytest.mark.once
def test_files_of_other_models_are_refused(builder_of, tmp_path):
    build = builder_of("decoder_lora")
    layer = "unet.mid_block.attentions.0.to_q"
    module = build(*RANK)
    out, width = module.unet.mid_block.attentions[0].to_q.weight.shape[::-1]

    def file(name, layer, down, up):
        write_lora(tmp_path / name, {layer: Update(down, up)}, "diffusers")
        return build(*RANK, f"--init_lora={tmp_path / name}")

    ones = np.ones((2, width), "float32"), np.ones((out, 2), "float32")
    cases = {
        "has the layer mid_block.attentions.7.to_q, which this model does not have": (
            layer.replace("0.to_q", "7.to_q"), *ones,
        ),
        r"it fits another model": (layer, np.ones((2, width + 1), "float32"), ones[1]),
        "--init_lora: .* matrix of unet.mid_block.attentions.0.to_q has NaN or inf": (layer, ones[0] * np.nan, ones[1]),
    }  # fmt: skip
    for number, (expected, lora) in enumerate(cases.items()):
        with pytest.raises(UserError, match=expected):
            initialized(file(f"{number}.safetensors", *lora))


def test_what_was_trained_in_full_goes_on_too_and_load_lora_reads_it(build, kandinsky, tmp_path):
    flags = [*RANK, "--lora_target_modules=to_q", "--trainable_modules=conv_in,time_embedding"]
    for library in ("ppdiffusers", "diffusers"):
        before = randomized(build("decoder_lora", *flags, f"--save_format={library}"))
        choose_trainable(before, before.args.trainable_modules)
        for parameter in (before.unet.conv_in.weight, before.unet.time_embedding.linear_1.weight):
            parameter.set_value(parameter * 1.5)
        before.save_pretrained(str(tmp_path / library))
        expected, encoded = loss_of(before)
        module = build("decoder_lora", *flags, f"--init_lora={tmp_path / library}")
        choose_trainable(module, module.args.trainable_modules)
        assert loss_of(initialized(module)[0], encoded)[0] == pytest.approx(expected, rel=1e-6)
        with pytest.raises(UserError, match="holds conv_in.*, which this run does not train; expected --trainable_mod"):
            initialized(build("decoder_lora", *flags[:-1], f"--init_lora={tmp_path / library}"))
        full = build("decoder")  # a pipeline's UNet, as a user loads it
        load_lora(full.unet, tmp_path / library)
        load_lora(full.unet, tmp_path / library)  # a second time replaces the first
        before.unet, full.args = full.unet, before.args
        assert loss_of(before, encoded)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["lora_sd3", "prior_lora", "lora_sdxl"])
def test_load_lora_gives_every_family_the_trained_model(builder_of, name, tmp_path):
    before = randomized(builder_of(name)(*RANK))
    before.save_pretrained(str(tmp_path))
    expected, encoded = loss_of(before)
    module = builder_of(name)()
    for model in [getattr(module, module.trained), *module.adapted.values()]:
        for layer in model.sublayers():
            if hasattr(layer, "lora_layer"):
                layer.lora_layer = None if hasattr(layer, "set_lora_layer") else layer.lora_layer
    load_lora(getattr(module, module.trained), tmp_path, **module.adapted)
    assert loss_of(module, encoded)[0] == pytest.approx(expected, rel=1e-6)
    if module.adapted:
        with pytest.raises(UserError, match="expected text_encoder=pipe.text_encoder, too"):
            load_lora(module.unet, tmp_path)


def test_a_run_starts_from_the_file_and_a_resumed_one_from_its_checkpoint(train, tmp_path, capsys):
    flags = ["--learning_rate=1e-30", "--adam_weight_decay=0", *RANK]
    first = train("prior_lora", *RANK, "--learning_rate=1e-2", out="first")
    second = train("prior_lora", *flags, f"--init_lora={first}", "--checkpointing_steps=1", out="second")
    assert "layers start from" in capsys.readouterr().out
    one, other = tensors(first / FILES["ppdiffusers"]), tensors(second / FILES["ppdiffusers"])
    assert one.keys() == other.keys() and all(np.allclose(one[key], other[key], atol=1e-7) for key in one)
    resumed = [*flags, "--resume_from_checkpoint=latest", "--max_train_steps=3", "--learning_rate=1e-2"]
    moved = shutil.copytree(first, tmp_path / "moved")
    third = train("prior_lora", *resumed, f"--init_lora={moved}", out="second")
    assert "--init_lora: the file is only compared, because" in capsys.readouterr().out
    assert not same(tensors(third / FILES["ppdiffusers"]), other), "it goes on"
    train("prior_lora", *resumed, "--max_train_steps=4", out="second")  # without the flag
    arrays, metadata = read_tensors(moved / FILES["ppdiffusers"])
    write_tensors(moved / FILES["ppdiffusers"], {key: 2 * array for key, array in arrays.items()}, metadata)
    with pytest.raises(SystemExit) as stopped:
        train("prior_lora", *resumed, "--max_train_steps=5", f"--init_lora={moved}", out="second")
    assert stopped.value.code == 2 and "was trained from other weights of --init_lora; expected" in last_error(capsys)
