"""All training scripts in fp16 and bf16, O1 and O2, on the device in software: each trains, draws, saves, and goes on
from a checkpoint; what its files hold is looked at by type, value and bit.

`make precision` runs every script in every precision. `make test` runs every script once, and every two settings
together at least once."""

import ppdiffusers_train  # noqa: F401

import json

import numpy as np
import paddle
import pytest
from PIL import Image

from ppdiffusers_train.data.packs import HIDDEN
from ppdiffusers_train.loop.dry_run import stored_size
from ppdiffusers_train.runtime.precision import DTYPES
from tests.conftest import encoded_samples, scalars, tensors
from tests.device.conftest import LOW
from tests.device.files import differing, fits, low_tensors, not_finite
from tests.device.jobs import COVERING, EVERYTHING, FAMILIES, FULL, LORA, Jobs, Setting, pairs
from tests.distributed.launching import script
from tests.test_architecture import SCRIPTS

STEPS, STOP = 4, 2
# Half the distance from 1 to the next number: the relative error of one rounding.
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
RUN = [f"--max_train_steps={STEPS}", f"--checkpointing_steps={STOP}"]
DRAW = ["--validation_prompts=a red circle", f"--validation_steps={STEPS}", "--validation_inference_steps=2"]
PARTS = {"prior": ["prior"], "sd3": ["transformer"], "vae_decoder": ["vae"], "lcm_distill_sd": ["unet", "unet_target"]}
PARTS["lcm_distill_sdxl"] = PARTS["lcm_distill_sd"]
MODEL = "diffusion_paddle_model.safetensors"


def test_the_jobs_are_all_scripts_and_settings_meet_in_pairs():
    assert sorted(map(script, (*FULL, *LORA))) == SCRIPTS and set(COVERING) == {*FULL, *LORA}
    assert sorted(name for family in FAMILIES.values() for name in family) == sorted(COVERING)
    covered = set().union(*map(pairs, COVERING.values()))
    off_and_on = (False, True)
    possible = [
        Setting(dtype, level, ema, accumulates, recomputes, cached, eight_bits)
        for dtype in ("fp16", "bf16")
        for level in ("O1", "O2")
        for ema in off_and_on
        for accumulates in off_and_on
        for recomputes in off_and_on
        for cached in off_and_on
        for eight_bits in off_and_on
        if not (eight_bits and level == "O2")
    ]
    assert covered == set().union(*map(pairs, possible))


# Paddle 2.6 has the first family's jobs in float16.
ONCE = [family if family == "kandinsky" else pytest.param(family, marks=pytest.mark.once) for family in FAMILIES]


@pytest.mark.parametrize("family", ONCE)
def test_every_script_once_and_every_pair_of_settings(family, jobs, on_device):
    run_and_check([(name, COVERING[name]) for name in FAMILIES[family]], jobs, on_device)


@pytest.mark.precision
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_script_in_every_precision(family, level, dtype, jobs, on_device):
    cases = [case for case in EVERYTHING if case[0] in FAMILIES[family]]
    run_and_check([case for case in cases if (case[1].level, case[1].dtype) == (level, dtype)], jobs, on_device)


@pytest.mark.once
def test_recomputed_activations_give_the_same_bits(jobs, on_device):
    check_recompute(
        [("decoder", "fp16", "O2"), ("sd3", "bf16", "O2"), ("lcm_distill_sd", "bf16", "O1")], jobs, on_device
    )


@pytest.mark.precision
@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_do_in_every_script_and_precision(family, jobs, on_device):
    cases = [(name, setting.dtype, setting.level) for name, setting in EVERYTHING if name in FAMILIES[family]]
    check_recompute(cases, jobs, on_device)


def check_recompute(cases, jobs, on_device):
    check_same_bits(cases, jobs, on_device, [], ["--gradient_checkpointing"])


@pytest.mark.once
def test_encoded_samples_from_the_cache_are_those_of_online_encoders(jobs, on_device):
    cases = [("prior", "fp16", "O1"), ("sdxl", "bf16", "O1"), ("lora_sdxl", "fp16", "O2"), ("sd3", "bf16", "O2")]
    cases = [case for case in cases if DTYPES[case[1]] in LOW]
    center = {name: ["--center_crop"] for name, *_ in cases if name != "prior"}
    check_same_bits(cases, jobs, on_device, ["--encoded_cache"], ["--no_encoded_cache"], center)
    for name, dtype, level in cases:
        found = encoded_samples(jobs.folder / f"{name}-{dtype}-{level}" / "encoded").values()
        sample = {part: array for part, array in next(iter(found)).items() if not part.startswith(HIDDEN)}
        given = {"time_ids", "text_mask"} & set(sample)
        full = {part for part, array in sample.items() if array.itemsize != 2}
        assert full == given | ({"latents"} & set(sample)), (name, full)
        in_dry_run = {
            part: paddle.ones([1, *array.shape], "int64" if part == "text_mask" else "float32")
            for part, array in sample.items()
        }
        counted = stored_size(in_dry_run, dict.fromkeys(given), dtype)
        assert counted == sum(array.nbytes for array in sample.values()), name


def check_same_bits(cases, jobs, on_device, first_flags, second_flags, of_jobs=()):
    """Two steps of each case with some flags and with others. `of_jobs` has flags of single jobs."""
    outs = {}
    for case in cases:
        name, dtype, level = case
        flags = ["--max_train_steps=2", "--checkpointing_steps=2", "--train_batch_size=2", *dict(of_jobs).get(name, [])]
        flags += [f"--mixed_precision={dtype}", f"--amp_level={level}"]
        out = "-".join(case)
        outs[case] = jobs.add(name, out, *flags, *first_flags), jobs.add(name, f"{out}-less", *flags, *second_flags)
    failed = [report["error"] or report["said"] for report in on_device(jobs.list) if report["status"]]
    assert not failed, failed[0]
    wrong = [(case, first("", differing(*(out / "checkpoint-2" for out in pair)))) for case, pair in outs.items()]
    assert not any(different for _, different in wrong), wrong


def run_and_check(cases, jobs, on_device):
    """Run several jobs in several settings in one process; all that is wrong is said together."""
    cases = [Case(name, setting, jobs) for name, setting in cases if DTYPES[setting.dtype] in LOW]
    reports = iter(on_device(jobs.list))
    wrong = []
    for case in cases:
        faults = case.faults([next(reports) for _ in case.outs])
        wrong += [f"{case.name}, {case.setting}: {fault}" for fault in faults]
    assert not wrong, "\n" + "\n".join(wrong)


class Case:
    """One job in one setting, as several runs: in float32, in 16 bits, resumed, and a step at a rate of 0 (of a
    job that writes a whole model)."""

    def __init__(self, name, setting: Setting, jobs: Jobs):
        self.name, self.setting, self.jobs = name, setting, jobs
        low = [*setting.other_flags, *setting.precision_flags]

        def add(out, *flags):
            return jobs.add(name, f"{name}-{setting.dtype}-{setting.level}-{out}", *flags)

        self.outs = {
            "float32": add("float32", *setting.other_flags, *RUN, *DRAW, f"--checkpointing_steps={STEPS + 1}"),
            "whole": add("whole", *low, *RUN, *DRAW),
        }
        checkpoint = self.outs["whole"] / f"checkpoint-{STOP}"
        self.outs["resumed"] = add("resumed", *low, *RUN, f"--resume_from_checkpoint={checkpoint}")
        if name in FULL:
            self.outs["still"] = add(
                "still", *low, "--learning_rate=0", "--max_train_steps=1", "--checkpointing_steps=1"
            )

    def faults(self, reports) -> list:
        """What is wrong with the case, in words."""
        reports = dict(zip(self.outs, reports))
        failed = [f"{run} ended with {r['status']}: {last_line(r)}" for run, r in reports.items() if r["status"]]
        failed_runs = {run for run, report in reports.items() if report["status"]}
        if failed_runs & {"float32", "whole"}:
            return failed
        found = failed + self.wrong_arithmetic(reports) + self.wrong_losses() + self.wrong_picture()
        if "resumed" not in failed_runs:
            found += self.wrong_resume()
        if "still" in self.outs.keys() - failed_runs:
            found += self.moved_without_learning()
        for run in self.outs.keys() - failed_runs:
            found += first(f"{run}: 16 bits in", low_tensors(self.outs[run]))
            found += first(f"{run}: NaN or inf in", not_finite(self.outs[run]))
        return found + self.rounded_values()

    def wrong_arithmetic(self, reports) -> list:
        """Where products were not computed in the type, there and back, or anything warned."""
        dtype = DTYPES[self.setting.dtype]
        kernels = [f"{kernel} {dtype} rounded" for kernel in ("matmul", "matmul_grad", "conv2d", "conv2d_grad")]
        if (
            "prior" in self.name or "sd3" in self.name or "qwen" in self.name
        ):  # no convolutions that learn or lie before what learns
            kernels = kernels[:2]
        if self.name == "vae_decoder":  # it learns in float32; the UNet of its validation images does not
            kernels = kernels[::2]
        found = [f"{kernel} never ran" for kernel in kernels if not reports["whole"]["calls"].get(kernel)]
        warned = [warning for warning in reports["whole"]["warnings"] if "precision" in warning or "amp" in warning]
        return found + first("warned:", warned)

    def wrong_losses(self) -> list:
        """Where losses lie too far from float32's.

        A loss is a mean over many numbers of squares of a prediction's error. A rounding is wrong by at most half a
        step, to either side; a prediction adds up some hundred of them, about as many up as down. So the first loss
        is off by less than one rounding, of the loss. From then on the weights differ, too: AdamW's first steps go by
        the learning rate into the direction of the gradient's sign, and where a gradient is nearly zero, rounding
        decides on the sign. Hence eight roundings for the steps behind the first. A distillation divides predictions
        by the share of the image that is left in the noise, down to a fifteenth: eight times as much.
        """
        plain, low = (scalars(self.outs[run]) for run in ("float32", "whole"))
        if len(low) != STEPS:
            return [f"{len(low)} losses in {STEPS} steps"]
        if self.skipped_steps():
            plain, low = plain[:1], low[:1]  # float32 has gone ahead
        unit = ROUNDING[self.setting.dtype] * (8 if "lcm" in self.name else 1)
        bounds = [unit if step == 0 else 8 * unit for step in range(len(low))]
        off = [abs(one - other) / one for one, other in zip(plain, low)]
        wrong = [step for step in range(len(low)) if not off[step] <= bounds[step]]
        return [f"loss {step + 1} is {low[step]}, in float32 {plain[step]}" for step in wrong[:1]]

    def skipped_steps(self) -> int:
        """How often the gradients of fp16 were too large, and no step was taken."""
        return json.loads((self.outs["whole"] / f"checkpoint-{STEPS}" / "state.json").read_text())["overflowed_steps"]

    def wrong_picture(self) -> list:
        """Where validation drew nothing, or something else than in float32."""
        plain, low = (
            np.asarray(Image.open(self.outs[run] / "validation" / f"step-{STEPS}.png").convert("RGB"), dtype="float32")
            for run in ("float32", "whole")
        )
        found = []
        if low.std() < plain.std() / 2:
            found.append(f"the picture is empty: a deviation of {low.std():.1f}, in float32 {plain.std():.1f}")
        if not self.skipped_steps() and np.abs(low - plain).mean() > 8:
            found.append(f"the picture is off by {np.abs(low - plain).mean():.1f} of 255")
        return found

    def wrong_resume(self) -> list:
        """Where the run that went on from a checkpoint ended in other bits."""
        last = f"checkpoint-{STEPS}"
        whole, resumed = self.outs["whole"], self.outs["resumed"]
        found = first("resumed differently:", differing(whole / last, resumed / last))
        one, other = (json.loads((out / last / "state.json").read_text()) for out in (whole, resumed))
        for name in one.keys() - {"arguments", "command"}:
            found += [f"resumed with {name} {other.get(name)}, not {one[name]}"] if one[name] != other.get(name) else []
        results = [path.name for path in whole.iterdir() if path.suffix == ".safetensors"] + PARTS.get(self.name, [])
        for name in results:
            one, other = whole / name, resumed / name
            same = one.read_bytes() == other.read_bytes() if one.is_file() else not differing(one, other)
            found += [] if same else [f"the resumed run's result has another {name}"]
        return found

    def moved_without_learning(self) -> list:
        """Where a step with a learning rate of 0 did not give back the weights that it began with, in float32."""
        found = []
        for part in PARTS.get(self.name, ["unet"]):
            base = tensors(self.jobs.base(self.name) / part.removesuffix("_target") / MODEL)
            checkpoint = self.outs["still"] / "checkpoint-1"
            folders = [self.outs["still"], checkpoint, *([checkpoint / "ema"] if self.setting.ema else [])]
            for folder in folders:
                learned = tensors(folder / part / MODEL)
                # The target network is an average, which float32 rounds.
                close = 1e-6 if part == "unet_target" else 0
                moved = [name for name in base if not np.allclose(base[name], learned[name], rtol=close, atol=0)]
                found += first(f"moved at a rate of 0 in {(folder / part).relative_to(checkpoint.parent)}:", moved)
        return found

    def rounded_values(self) -> list:
        """Tensors that learn, and hold only numbers that the low type has, too."""
        folder = self.outs["whole"] / f"checkpoint-{STEPS}"
        files = sorted(folder.glob(f"*/{MODEL}")) + sorted(folder.glob("lora_parameters.safetensors"))
        files += sorted(folder.glob("ema.safetensors"))
        if not files:
            return [f"no weights in {sorted(path.name for path in folder.iterdir())}"]
        found = []
        for file in files:
            for name, array in tensors(file).items():
                # One number in 8,000 fits into fp16 by chance, one in 65,000 into bf16; zeros are what nobody uses.
                array = array[array != 0]
                if array.size >= 64 and np.ptp(array) > 0 and fits(array, self.setting.dtype).mean() > 0.5:
                    found.append(f"{file.relative_to(folder)}: {name}")
        return first("rounded:", found)


def first(what, names) -> list:
    """One line for several of a kind."""
    return [f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")] if names else []


def last_line(report) -> str:
    return (report["error"] or report["said"] or "no word").strip().splitlines()[-1][:300]
