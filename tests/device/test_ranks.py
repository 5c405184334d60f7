"""Two processes in 16 bits, each with a device of its own: they learn what one does, sharded and unsharded."""

import ppdiffusers_train  # noqa: F401

import itertools
import json

import numpy as np
import pytest

from tests.conftest import scalars, tensors
from tests.device.files import differing, fits, low_tensors, tensor_files
from tests.device.jobs import FULL, LORA

STEPS, STOP = 4, 2  # of two samples from seven: the last one has a single sample, and rank 1 none
RUN = [f"--max_train_steps={STEPS}", f"--checkpointing_steps={STOP}", "--train_batch_size=1", "--use_ema"]
ALONE = ["--gradient_accumulation_steps=2"]
SHARDED = ["--sharding_degree=2"]
FEW = [("decoder", "bf16", "O2"), ("prior", "fp16", "O1"), ("lora_sdxl", "bf16", "O1"), ("decoder_lora", "fp16", "O1")]
ALL = [(name, dtype, level) for name in (*FULL, *LORA) for dtype in ("fp16", "bf16") for level in ("O1", "O2")]


@pytest.mark.once
def test_two_processes_learn_what_one_does_sharded_or_not(jobs, on_device):
    check_ranks(FEW, jobs, on_device)


@pytest.mark.precision
@pytest.mark.parametrize("name", (*FULL, *LORA))
def test_so_they_do_in_every_script_and_precision(name, jobs, on_device):
    check_ranks([case for case in ALL if case[0] == name], jobs, on_device)


def check_ranks(cases, jobs, on_device):
    """Run each case in one process, in two, in two that share the optimizer's state, and resumed."""
    outs = {case: {} for case in cases}

    def run(ranks, **kinds):
        jobs.list = []
        for case, (kind, more) in itertools.product(cases, kinds.items()):
            name, dtype, level = case
            flags = [*RUN, f"--mixed_precision={dtype}", f"--amp_level={level}", *more]
            if kind == "resumed":
                flags.append(f"--resume_from_checkpoint={outs[case]['sharded'] / f'checkpoint-{STOP}'}")
            outs[case][kind] = jobs.add(name, "-".join((*case, kind)), *flags)
        return on_device(jobs.list, ranks)

    reports = run(1, one=ALONE) + run(2, two=[])
    reports += run(2, sharded=SHARDED, resumed=SHARDED)  # apart: a process joins the others once, one way or another
    failed = [report["error"] or report["said"] for report in reports if report["status"]]
    assert not failed, failed[0]
    wrong = []
    for (name, dtype, level), runs in outs.items():
        faults = wrong_sharding(runs) + wrong_sums(runs, dtype)
        wrong += [f"{name} {dtype} {level}: {fault}" for fault in faults]
    assert not wrong, "\n" + "\n".join(wrong)


def wrong_sharding(runs) -> list:
    """Where sharded runs hold something else than unsharded ones, or go on differently."""
    last, found = f"checkpoint-{STEPS}", []
    for one, other in (("two", "sharded"), ("sharded", "resumed")):
        folders = [runs[run] / last for run in (one, other)]
        moments, weights = zip(*map(contents, folders))
        assert weights[0]  # of moments there are none where all steps have overflowed
        for what, (left, right) in (("moments", moments), ("weights", weights)):
            different = [name for name in left.keys() | right.keys() if not same(left.get(name), right.get(name))]
            if different:
                found.append(f"{one} and {other} have other {what}, {len(different)} of {len(left)}: {different[0]}")
    found += [f"16 bits in {run}: {low[0]}" for run in runs if (low := low_tensors(runs[run]))]
    return found


def same(one, other):
    return one is not None and other is not None and one.dtype == other.dtype and np.array_equal(one, other)


def contents(checkpoint):
    """(the optimizer's tensors, all others) of a checkpoint: {name: array}, whatever files they are divided into."""
    moments, others = {}, {}
    for file in tensor_files(checkpoint):
        arrays = tensors(checkpoint / file)
        if file.name.startswith("optimizer"):
            moments.update(arrays)
        else:
            others.update({f"{file}: {name}": array for name, array in arrays.items()})
    return moments, others


def wrong_sums(runs, dtype) -> list:
    """Where two processes learn something else than one that accumulates.

    They compute the same two gradients, of which a float32 sum of two has no order. The loss of each is scaled by 1 and
    not by 1/2, which changes no bit of bfloat16, but numbers that are subnormal in float16.
    """
    one, two = (scalars(runs[run]) for run in ("one", "two"))
    if not np.allclose(one, two, rtol=1e-6 if dtype == "bf16" else 2e-3):
        return [f"losses {two}, of one process {one}"]
    if dtype == "fp16":
        return []
    different = differing(runs["one"] / f"checkpoint-{STEPS}", runs["two"] / f"checkpoint-{STEPS}")
    return [f"two differ from one in {len(different)}: {different[0]}"] if different else []


SUMS = {"accumulated": 1, "two ranks": 2}


@pytest.mark.once
@pytest.mark.parametrize("how", SUMS)
def test_gradients_are_summed_in_float32(how, jobs, on_device):
    """Of weights in bfloat16. Each of the two gradients has 8 digits, most of their sums have more."""
    flags = ["--max_train_steps=1", "--checkpointing_steps=1", "--train_batch_size=1", "--max_grad_norm=1e9"]
    flags += ["--mixed_precision=bf16", "--amp_level=O2", *([] if SUMS[how] > 1 else ALONE)]
    out = jobs.add("decoder", "sums", *flags)
    (report,) = on_device(jobs.list, ranks=SUMS[how])
    assert report["status"] == 0, report
    assert json.loads((out / "checkpoint-1" / "state.json").read_text())["position"] == 2
    moments, _ = contents(out / "checkpoint-1")
    # The first moment after a step is a tenth of the gradient. The weights of convolutions are in bfloat16.
    tenths = [array.ravel() for name, array in moments.items() if "moment1" in name and array.ndim == 4]
    sums = np.concatenate(tenths) / np.float32(0.1)
    sums = sums[sums != 0]
    nearest = (sums.view("uint32") + 0x8000 & 0xFFFF0000).view("float32")
    assert fits(nearest, "bf16").all()
    assert (np.abs(sums - nearest) > 2.0**-18 * np.abs(sums)).mean() > 0.5
