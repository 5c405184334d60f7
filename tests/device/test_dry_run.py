"""What only counts, or draws samples, computes on the CPU: its memory is what is read, whatever devices there are."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import re
from pathlib import Path

import paddle
import pytest

from ppdiffusers_train.cpu import patches
from ppdiffusers_train.loop.dry_run import options_of
from ppdiffusers_train.loop.memory_estimate import take_inventory
from ppdiffusers_train.loop.state import build_training_state
from ppdiffusers_train.module import choose_trainable
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.runtime.quantized import quantize_models
from tests.conftest import load_script, module_class
from tests.distributed.launching import script

USE_DEVICE = {"call": "tests.device.runner:use_device"}


def estimate(said):
    """The lines about memory in what a dry run says."""
    return re.findall(r"^  (\w.*?)  +([\d.]+ [GM]B)", said.partition("memory per GPU")[2], re.MULTILINE)


def computed(report):
    """The kernels that ran on the device, but for those that ppdiffusers makes constants with when it is imported."""
    return {kernel for kernel in report["calls"] if not kernel.startswith("full ")}


@pytest.fixture
def dry_run(decoder_flags):
    return {"script": str(script("decoder")), "flags": [*map(str, decoder_flags), "--dry_run"]}


def test_a_dry_run_and_a_preview_leave_the_device_alone(
    on_device, train_decoder, dry_run, capsys, tmp_path, monkeypatch
):
    words = [dry_run["script"], *dry_run["flags"][:-1], f"--preview_output={tmp_path / 'preview.png'}"]
    preview = {"call": "ppdiffusers_train.tools.preview:preview", "arguments": {"words": words}}
    counted, _, drawn = on_device([dry_run, USE_DEVICE, preview])
    assert counted["status"] == drawn["status"] == 0, counted["error"] + drawn["error"]
    assert computed(counted) == computed(drawn) == set()
    assert (tmp_path / "preview.png").is_file()
    capsys.readouterr()
    train_decoder("--dry_run")
    on_cpu = estimate(capsys.readouterr().out)
    monkeypatch.setenv(patches.VARIABLE, "none")
    train_decoder("--dry_run")
    unpatched = estimate(capsys.readouterr().out)
    assert estimate(counted["said"]) == unpatched, "the device runs Paddle's own functions"
    assert unpatched != on_cpu or paddle.__version__.startswith("2."), "there the patches save no memory of this model"


def test_ranks_that_were_launched_for_devices_make_a_dry_run_too(on_device, dry_run):
    (report,) = on_device([dry_run], ranks=2)
    assert report["status"] == 0 and "2 steps of 4 samples" in report["said"], report["error"] + report["said"]
    assert computed(report) == set()


def weights_in_memory(script, flags):
    """[bytes of weights by kind, as counted and as they are] of a run that is about to begin."""
    job = load_script(Path(script))
    args = job.build_parser().parse_args(flags)
    module = module_class(job)(args)
    choose_trainable(module, args.trainable_modules)
    quantize_models(module)
    counted = take_inventory(module, {False: 0, True: 0}, 0, 0).memory(options_of(args))
    state = build_training_state(module, args, 2, 1, start_ranks())
    state.precision.cast_models(module, state.optimizer)
    trained = {id(parameter) for parameter in state.parameters.values()}
    found = {"trainable weights": 0, "frozen weights": 0, "encoders": 0}
    for name, model in module.named_children():
        codes = [tensor for tensor in model.buffers() if tensor.dtype == paddle.uint8]
        for tensor in [*model.parameters(), *filter(paddle.is_floating_point, model.buffers()), *codes]:
            assert str(tensor.place) == str(paddle.zeros([1]).place), "quantized weights were loaded on the host"
            frozen = "encoders" if name in module.encoders else "frozen weights"
            found["trainable weights" if id(tensor) in trained else frozen] += tensor.numpy().nbytes
    masters = sum(master.numpy().nbytes for master in state.optimizer._master_weights.values())
    moments = sum(8 * parameter.size + 8 for parameter in state.parameters.values())
    return [{name: counted[name] for name in found} | {"masters": counted["optimizer"] - moments},
            found | {"masters": masters}]  # fmt: skip


PRECISIONS = [["--mixed_precision=fp16"], ["--mixed_precision=bf16", "--amp_level=O2"]]
JOBS = {
    "prior": [], "prior_lora": [], "sdxl": ["--trainable_modules=mid_block"], "lora_sdxl": ["--quantize_base=nf4"],
    "lora_sd3": [],
}  # fmt: skip


@pytest.mark.once  # Paddle 2.6 has no bfloat16 on plugins
def test_weights_are_counted_in_the_types_that_they_are_cast_to(on_device, decoder_flags, sdxl_flags, sd3_flags):
    flags = {name: sd3_flags if "sd3" in name else sdxl_flags if "sdxl" in name else decoder_flags for name in JOBS}
    calls = {
        (name, *precision): {"script": str(script(name)), "flags": [*map(str, flags[name]), *JOBS[name], *precision]}
        for name in JOBS
        for precision in PRECISIONS
    }
    call = "tests.device.test_dry_run:weights_in_memory"
    reports = on_device([{"call": call, "arguments": arguments} for arguments in calls.values()])
    for name, report in zip(calls, reports):
        assert report["status"] == 0, report["error"]
        counted, found = report["result"]
        # In float16, Paddle keeps layer norms in float32: a hundredth of these tiny models, more of quantized ones.
        assert counted == pytest.approx(found, rel=0.02), name
    assert sum(report["result"][1]["masters"] for report in reports) > 0
