"""Every pipeline that a full job writes is a base of every script of its family, and loads in the library it is for."""

import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
import pytest
from ppdiffusers import DiffusionPipeline

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.no_pipeline import WEIGHTS
from ppdiffusers_train.models.weight_files import parse_name
from ppdiffusers_train.tensor_files import read_tensors, write_index, write_parts, write_tensors
from tests.conftest import ROOT, encode, last_error, load_script, module_class, short_run

pytestmark = pytest.mark.once  # files and names, no numbers

SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("*/train_*.py"))}
DECODER, PRIOR = "train_text_to_image_decoder", "train_text_to_image_prior"


def family_of(name):
    """The family of models that a script trains."""
    if SCRIPTS[name].parent.name == "kandinsky2_2":
        return "kandinsky"
    return next((family for family in ("sdxl", "sd3", "qwen") if family in name), "sd")


def is_full(name):
    """Whether a script's result is a whole pipeline; that of a distillation is the student alone."""
    return "lora" not in name and "lcm" not in name


def writers():
    """[(script, more flags)] of all jobs that write pipelines."""
    for name in SCRIPTS:
        if is_full(name):
            yield name, ()
            if family_of(name) == "sd3":
                yield name, ("--no_t5",)


@pytest.fixture(scope="module")
def bases(sd, sdxl, sd3, kandinsky):
    """{family: flags that name its base}."""
    one = {"sd": sd, "sdxl": sdxl, "sd3": sd3}
    prior, decoder = kandinsky
    return {**{family: (folder,) for family, folder in one.items()}, "kandinsky": (decoder, prior)}


def base_flags(name, *folders):
    """The flags by which a script is given its base; Kandinsky's have two."""
    if family_of(name) == "kandinsky":
        flags = ("--pretrained_decoder_model_name_or_path", "--pretrained_prior_model_name_or_path")
    else:
        flags = ("--pretrained_teacher_model" if "lcm" in name else "--pretrained_model_name_or_path",)
    return [f"{flag}={folder}" for flag, folder in zip(flags, folders, strict=True)]


def only_halves(folder, target):
    """A copy of a pipeline whose weights are all of the variant fp16, and no others."""
    shutil.copytree(folder, target)
    for file in target.rglob("*.safetensors"):
        content, metadata = read_tensors(file)
        halves = {
            name: array.astype("float16") if array.dtype == "float32" else array for name, array in content.items()
        }
        write_tensors(file.with_name(f"{file.stem}.fp16.safetensors"), halves, metadata)
        file.unlink()
    return target


@pytest.fixture(scope="module")
def results(bases, photos, tmp_path_factory):
    """`results(script, flags, layout)` is what a job writes in a step; for torch, from a base that has only halves."""
    made = {}

    def run(name, flags, layout):
        if (name, flags, layout) not in made:
            folder = tmp_path_factory.mktemp("results")
            base, more = bases[family_of(name)], ["--variant=fp16"] if layout == "diffusers" else []
            if more:
                base = [only_halves(part, folder / f"base{number}") for number, part in enumerate(base)]
            load_script(SCRIPTS[name]).main([
                *base_flags(name, *base), *short_run(photos), "--max_train_steps=1", f"--output_dir={folder / 'out'}",
                f"--save_format={layout}", "--no_final_checkpoint", *more, *flags,
            ])  # fmt: skip
            made[name, flags, layout] = folder / "out"
        return made[name, flags, layout]

    return run


def can_begin(name, photos, *flags):
    """Build a script's module, and compute a loss of its encoders and models."""
    job = load_script(SCRIPTS[name])
    module = module_class(job)(job.build_parser().parse_args([*short_run(photos), *flags]))
    loss = module(encode(module, build_dataset(module.args), [0]), Draws(0, [0]))
    assert np.isfinite(float(loss)), name


def roles(name, family, result, base):
    """The ways in which a result is a base: in the place of either of Kandinsky's two, or both."""
    if family != "kandinsky":
        return [(result,)]
    return [(result, base[1]), (result, result)] if name == DECODER else [(base[0], result)]


@pytest.mark.parametrize("layout", ["ppdiffusers", "diffusers"])
@pytest.mark.parametrize("name, flags", list(writers()), ids=str)
def test_a_result_is_a_base_of_every_script_of_its_family(results, bases, photos, name, flags, layout):
    result, family = results(name, flags, layout), family_of(name)
    names = [path.name for path in result.rglob("*") if path.name.endswith(WEIGHTS)]
    assert names and all(parse_name(file).variant is None for file in names)
    for other in SCRIPTS:
        if family_of(other) == family:
            for folders in roles(name, family, result, bases[family]):
                can_begin(other, photos, *base_flags(other, *folders), *flags)


@pytest.mark.parametrize("name, flags", list(writers()), ids=str)
def test_a_result_loads_plainly_and_draws(results, name, flags):
    folder = results(name, flags, "ppdiffusers")
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, entry in index.items() if entry == [None, None]}
    assert ({"text_encoder_3", "tokenizer_3"} <= absent.keys()) == ("--no_t5" in flags)
    # Both libraries call T5 no optional part, so they have to be told that it is not there.
    pipe = DiffusionPipeline.from_pretrained(str(folder), **(absent if "--no_t5" in flags else {}))
    assert type(pipe).__name__ == index["_class_name"]
    steps = {"prior_num_inference_steps": 2} if name == DECODER else {}
    size = {} if name == PRIOR else {"height": 64, "width": 64, "output_type": "np"}
    drawn = pipe("a cat", num_inference_steps=2, **steps, **size)
    assert np.isfinite(drawn.image_embeds.numpy() if name == PRIOR else drawn.images).all()


def test_a_combined_kandinsky_gives_its_prior_s_scheduler(results, bases, photos, tmp_path):
    combined = results(DECODER, (), "ppdiffusers")
    flags = base_flags(PRIOR, bases["kandinsky"][0], combined)
    out = tmp_path / "out"
    load_script(SCRIPTS[PRIOR]).main(
        [*flags, *short_run(photos), "--max_train_steps=1", f"--output_dir={out}", "--no_final_checkpoint"]
    )
    assert json.loads((out / "model_index.json").read_text())["scheduler"] == ["ppdiffusers", "UnCLIPScheduler"]
    original = bases["kandinsky"][1] / "scheduler" / "scheduler_config.json"
    assert json.loads((out / "scheduler" / original.name).read_text()) == json.loads(original.read_text())


ONLY_LORA = "holds LoRA layers and no pipeline; expected the base that they were trained on"
WITHOUT_A_PIPELINE = {
    "the student of a distillation": (
        ["unet/config.json", "unet_target/config.json"],
        "holds only unet/, unet_target/",
    ),
    "one model": (["config.json", "model.safetensors"], "holds only one model and no pipeline"),
    "LoRA layers": (["pytorch_lora_weights.safetensors"], ONLY_LORA),
    "LoRA layers and a model": (["lora.safetensors", "unet/config.json"], ONLY_LORA),
    "a checkpoint": (["state.json", "unet/config.json"], "is a checkpoint of a run, which --resume_from_checkpoint"),
    "nothing of these": (["a.txt"], "is not a pipeline: it has no model_index.json"),
}


@pytest.mark.parametrize("kind", WITHOUT_A_PIPELINE)
def test_a_folder_that_is_no_pipeline_is_refused_by_what_it_is(photos, tmp_path, capsys, kind):
    files, message = WITHOUT_A_PIPELINE[kind]
    for file in files:
        (tmp_path / "base" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / file).write_text("{}")
    for name in ("train_text_to_image_sdxl", "train_lcm_distill_sd_wds"):
        with pytest.raises(SystemExit) as stopped:
            flags = [*base_flags(name, tmp_path / "base"), *short_run(photos), f"--output_dir={tmp_path / 'out'}"]
            load_script(SCRIPTS[name]).main(flags)
        line = last_error(capsys)
        assert stopped.value.code == 2 and f"{str(tmp_path / 'base')!r} " in line and message in line


def test_t5_is_asked_of_a_result_without_it(results, photos):
    name = "train_text_to_image_sd3"
    with pytest.raises(UserError, match="has no part 'text_encoder_3'; .*; --no_t5 trains without T5"):
        can_begin(name, photos, *base_flags(name, results(name, ("--no_t5",), "ppdiffusers")))


@pytest.mark.parametrize(
    "name, family",
    [("train_text_to_image", "sdxl"), ("train_lcm_distill_sd_wds", "sdxl"), ("train_text_to_image_lora_sdxl", "sd")],
)
def test_a_base_of_another_family_is_refused(bases, photos, name, family):
    with pytest.raises(UserError, match="is a StableDiffusionXLPipeline; expected a|has no part 'text_encoder_2'"):
        can_begin(name, photos, *base_flags(name, *bases[family]))


def test_a_model_for_inpainting_and_another_vae_are_refused(sdxl, sd3, photos, tmp_path):
    name, base = "train_text_to_image_sdxl", shutil.copytree(sdxl, tmp_path / "base")
    vae = f"--pretrained_vae_model_name_or_path={sd3}"
    with pytest.raises(UserError, match="has a unet that takes 4 channels, and the VAE gives 16; expected equal"):
        can_begin(name, photos, *base_flags(name, sdxl), vae)
    config = base / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    with pytest.raises(UserError, match="has a unet that takes 9 channels, and the VAE gives 4; expected .*inpainting"):
        can_begin(name, photos, *base_flags(name, base))


def test_weights_of_a_variant_alone_are_named(photos, sdxl, tmp_path, capsys):
    base = only_halves(sdxl, tmp_path / "base")
    flags = [*base_flags("train_text_to_image_sdxl", base), *short_run(photos), f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        load_script(SCRIPTS["train_text_to_image_sdxl"]).main(flags)
    assert stopped.value.code == 2 and "only --variant fp16" in last_error(capsys)


@pytest.mark.parametrize("is_divided", [False, True])
@pytest.mark.parametrize("name", ["train_text_to_image_lora_sdxl", "train_lcm_distill_lora_sdxl_wds"])
def test_a_vae_from_elsewhere_may_have_the_variant_alone(sdxl, photos, tmp_path, name, is_divided):
    vae = only_halves(sdxl / "vae", tmp_path / "vae")
    if is_divided:
        (file,) = vae.glob("*.safetensors")
        content, metadata = read_tensors(file)
        parts = write_parts(vae, "diffusion_paddle_model", content.items(), 100_000, metadata)
        named = {part: part.replace("model-", "model.fp16-") for part in parts}
        for part in parts:
            (vae / part).rename(vae / named[part])
        write_index(
            vae / "diffusion_paddle_model.safetensors.index.fp16.json",
            {key: named[part] for part, keys in parts.items() for key in keys}, 0,
        )  # fmt: skip
        file.unlink()
        assert len(parts) > 1
    flags = [*base_flags(name, sdxl), f"--pretrained_vae_model_name_or_path={vae}"]
    with pytest.raises(UserError, match="--pretrained_vae_model.*: .* has no weights in vae/; only --variant fp16"):
        can_begin(name, photos, *flags)
    can_begin(name, photos, *flags, "--variant=fp16")


def test_a_variant_that_is_not_there_is_said(photos, sdxl, tmp_path, capsys):
    name = "train_text_to_image_sdxl"
    can_begin(name, photos, *base_flags(name, sdxl), "--variant=fp61")
    assert f"{str(sdxl)!r} has no weights of --variant fp61; those without one are used" in capsys.readouterr().out
