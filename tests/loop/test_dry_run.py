"""`--dry_run`: what it prints, compared with the run itself."""

import ppdiffusers_train  # noqa: F401

import gc
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ppdiffusers_train.loop import dry_run, state
from ppdiffusers_train.loop.dry_run import inventory_of, options_of
from ppdiffusers_train.loop.memory_estimate import (
    EMA_UPDATE_BYTES,
    IN_FLIGHT_BYTES,
    Peaks,
    extrapolate,
    extrapolate_peak,
)
from ppdiffusers_train.runtime.adamw_8bit import BLOCK, AdamW8bit
from ppdiffusers_train.runtime.ema import EMA
from ppdiffusers_train.toy.models.sdxl import build_sdxl
from tests.conftest import builder, module_class, optimizer_state, runner, tensors

KANDINSKY_JOBS = ("decoder", "prior", "decoder_lora", "prior_lora")
SDXL_JOBS = ("sdxl", "lora_sdxl")
LCM_JOBS = ("lcm_sd", "lcm_lora_sdxl")


def without_weights(source, target):
    """A copy of a pipeline's folder with nothing but configurations and tokenizers."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.pdparams"))
    return target


@pytest.fixture
def jobs(kandinsky_jobs, sdxl_jobs, lcm_jobs, kandinsky, sdxl, sd, photos, tmp_path):
    """{name: (its script, flags with folders that have weights, flags with folders that have none)}."""
    common = [f"--train_data_dir={photos}", "--resolution=64", "--train_batch_size=2", f"--output_dir={tmp_path / 'o'}"]
    bare = {folder: without_weights(folder, tmp_path / folder.name) for folder in (*kandinsky, sdxl, sd)}
    prior, decoder = kandinsky
    jobs = {name: (job, {"prior_model": prior, "decoder_model": decoder}) for name, job in kandinsky_jobs.items()}
    jobs.update({name: (job, {"model": sdxl}) for name, job in sdxl_jobs.items()})
    jobs.update({f"lcm_{name}": (job, {"teacher": sdxl if "xl" in name else sd}) for name, job in lcm_jobs.items()})

    def flags(models, folders):
        ends = {"teacher": "teacher_model"}
        return [
            *(
                f"--pretrained_{ends.get(name, f'{name}_name_or_path')}={folders(path)}"
                for name, path in models.items()
            ),
            *common,
        ]

    return {
        name: (job, flags(models, lambda path: path), flags(models, bare.get)) for name, (job, models) in jobs.items()
    }


@pytest.mark.once
@pytest.mark.parametrize("name", [*KANDINSKY_JOBS, *SDXL_JOBS, *LCM_JOBS])
def test_every_script_says_what_it_would_do_without_any_weights(jobs, name, tmp_path, capsys):
    job, flags, bare = jobs[name]
    job.main([*bare, "--dry_run", "--num_train_epochs=5"])
    said = capsys.readouterr().out
    real = module_class(job)(job.build_parser().parse_args(flags))
    real.load_rest()
    trainable = {id(parameter) for parameter in real.trainable_parameters()}
    for child, model in real.named_children():
        size, trained = (
            sum(parameter.size for parameter in model.parameters() if chosen(parameter))
            for chosen in (lambda _: True, lambda parameter: id(parameter) in trainable)
        )
        role = f"{trained:,} trainable" if trained else "frozen, encodes" if child in real.encoders else "frozen\n"
        assert re.search(rf"  {child} +{size:,} parameters of {type(model).__name__}, {role}", said)
    assert "7 samples with 7 captions\n  20 steps of 2 samples: 5.0 epochs of 4 steps" in said
    for part in ("gradients", "optimizer", "activations", "total, training", "peak", "what would reduce"):
        assert part in said
    assert not list((tmp_path / "o").iterdir()), "nothing is written"


@pytest.mark.parametrize("flags", [[], ["--use_8bit_adam"], ["--use_ema"]])
def test_weights_gradients_and_states_are_exact_to_the_byte(train_sdxl, build_sdxl_module, flags):
    out = train_sdxl("sdxl", *flags, "--max_train_steps=1", "--checkpointing_steps=1")
    module = build_sdxl_module("sdxl", *flags)
    memory = inventory_of(module, ROW, module.args).memory(options_of(module.args))
    weights = sum(parameter.numpy().nbytes for parameter in module.unet.parameters())
    assert memory["trainable weights"] == memory["gradients"] == weights and memory["frozen weights"] == 0
    encoders = [parameter for name in module.encoders for parameter in getattr(module, name).parameters()]
    assert memory["encoders"] == sum(parameter.numpy().nbytes for parameter in encoders)
    state = optimizer_state(out / "checkpoint-1").items()
    counts = sum(array.nbytes for name, array in state if name.endswith("step"))  # an integer in memory
    assert memory["optimizer"] == sum(array.nbytes for _, array in state) - counts
    averages = tensors(out / "checkpoint-1" / "ema.safetensors").values() if "--use_ema" in flags else []
    assert memory["EMA"] == sum(array.nbytes for array in averages)


@pytest.mark.once  # Paddle 2.6 takes an eighth more
def test_what_an_update_takes_is_known():
    """Of the last of three: Paddle makes more of the first."""
    for size in (2**20, 2**20 + BLOCK // 2):
        parameter = paddle.create_parameter([size], "float32")
        adam, average = AdamW8bit(1e-3, [parameter]), EMA({"parameter": parameter})
        for _ in range(3):
            parameter.grad = paddle.ones([size])
            with Peaks() as peaks:
                adam.step()
                peaks.mark()
                average.update()
                peaks.mark()
        assert peaks.peaks == pytest.approx([AdamW8bit.update_bytes(size), EMA_UPDATE_BYTES * size], rel=0.01)


@pytest.mark.once
@pytest.mark.parametrize("name, flags", [("sdxl", []), ("lora_sdxl", ["--use_ema"])])
def test_a_run_loads_fills_its_cache_and_trains(build_sdxl_module, name, flags):
    module = build_sdxl_module(name, *flags)
    inventory, options = inventory_of(module, ROW, module.args), options_of(module.args)
    module.load_rest()
    everything, average, encoders = (
        sum(parameter.numpy().nbytes for parameter in parameters)
        for parameters in (
            module.parameters(),
            module.trainable_parameters() if flags else [],
            [parameter for name in module.encoders for parameter in getattr(module, name).parameters()],
        )
    )
    low = replace(options, mixed_precision="fp16", amp_level="O2")
    # Models are lowered when all are there.
    for each in (options, low):
        assert inventory.phases(each)["loading"] == everything + average
    assert set(inventory.phases(options)) == {"loading", "training"}
    cached = replace(options, cached=True)
    assert inventory.phases(cached)["loading"] == everything + average - encoders
    assert inventory.phases(cached)["filling the cache"] == encoders + inventory.encoding
    in_16_bits = inventory.phases(replace(cached, mixed_precision="fp16"))["filling the cache"] - inventory.encoding
    assert encoders / 2 < in_16_bits < encoders
    assert inventory.phases(cached)["training"] < inventory.phases(options)["training"]
    assert inventory.peak(cached) == max(inventory.phases(cached).values())
    more = inventory.memory(replace(options, ranks=2))["gradients"] - inventory.memory(options)["gradients"]
    assert more == min(IN_FLIGHT_BYTES, 4 * sum(inventory.trained)) > 0


@pytest.mark.once
def test_a_resumed_run_frees_its_encoders_before_it_reads_the_optimizer(sdxl_jobs, train_sdxl, monkeypatch):
    """Else it would need more memory than the run that it resumes."""
    train_sdxl("sdxl", "--checkpointing_steps=1")
    found, read = [], state.load_optimizer_tensors

    def look_and_read(optimizer, parameters, tensors):
        trained = next(iter(parameters.values()))
        # The type of a dead proxy can be asked for, its class cannot.
        modules = [each for each in gc.get_objects() if issubclass(type(each), sdxl_jobs["sdxl"].SDXLTrainingModule)]
        (module,) = (each for each in modules if any(parameter is trained for parameter in each.parameters()))
        found.extend(getattr(module, name) for name in module.encoders)
        read(optimizer, parameters, tensors)

    monkeypatch.setattr(state, "load_optimizer_tensors", look_and_read)
    train_sdxl("sdxl", "--resume_from_checkpoint=checkpoint-1")
    assert found == [None] * 3


@pytest.mark.once
@pytest.mark.parametrize(
    "channels, flags",
    [
        ((16, 32), ["--no_encoded_cache"]),
        ((32, 64), ["--train_batch_size=2"]),
        ((64, 96), ["--gradient_checkpointing"]),
    ],
)
def test_the_estimate_is_within_fifteen_percent_of_what_a_run_takes(
    channels, flags, sdxl_jobs, sdxl_flags, tmp_path, monkeypatch
):
    """At 160 pixels, extrapolated from smaller ones; all of a run on encoded samples, from loading to its end."""
    monkeypatch.setattr(dry_run, "MEASURED", (64, 96, 128))  # tiny models have tiny gradients of weights
    model = build_sdxl(tmp_path / "model", channels=channels)
    more = [
        f"--pretrained_model_name_or_path={model}",
        "--resolution=160",
        "--train_batch_size=1",
        "--max_train_steps=2",
    ]
    more += ["--gradient_accumulation_steps=2", "--center_crop", f"--encoded_cache_dir={tmp_path / 'cache'}", *flags]
    run, module = runner(sdxl_jobs, [*sdxl_flags, *more], tmp_path), builder(sdxl_jobs, [*sdxl_flags, *more])("sdxl")
    options = replace(options_of(module.args), cached="--no_encoded_cache" not in flags)
    estimate = inventory_of(module, ROW, module.args).phases(options)["training"]
    run("sdxl", "--max_train_steps=1", out="encodes")
    gc.collect()  # what that run has left behind
    with Peaks() as peaks:
        run("sdxl")
        peaks.mark()
    assert estimate == pytest.approx(max(peaks.peaks), rel=0.15)


@pytest.mark.once
def test_polynomials_are_extrapolated_exactly():
    pixels = np.float64([8, 16, 24, 100]) ** 2
    one, other = 7 + 3 * pixels + 0.5 * pixels**2, 5000 + pixels
    assert extrapolate([8, 16, 24], np.stack([one, other], axis=1)[:3], 100) == pytest.approx([one[3], other[3]])
    assert extrapolate([8], [[3, 9, 4]], 8).tolist() == [3, 9, 4]


@pytest.mark.once
def test_the_highest_of_all_stretches_counts_with_what_rises_above_its_ends():
    def peaks(pixels):
        """Two stretches: one ends with 10 bytes a pixel and needs no more, one needs 4 more on the way to none."""
        return SimpleNamespace(levels=[0, 10 * pixels, 0], peaks=[10 * pixels, 14 * pixels])

    sizes = [8, 16, 24]
    assert extrapolate_peak(sizes, [peaks(size**2) for size in sizes], 100) == pytest.approx(14 * 100**2, rel=1e-3)
    assert extrapolate_peak([8], [peaks(64)], 8) == 14 * 64


def photograph():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, [90, 120, 3], dtype=np.uint8))


ROW = {"image": photograph(), "caption": "a cat", "name": "noise"}


def test_what_python_frees_later_is_not_counted():
    """Layers refer to each other, so a model of before is freed by the next collection of cycles."""
    cycle = {"tensor": paddle.ones([1000])}
    cycle["self"] = cycle
    gc.disable()
    del cycle
    with Peaks() as peaks:
        gc.collect()
        peaks.mark()
    gc.enable()
    assert peaks.levels[1] == 0
