"""How fast whole jobs train on a CPU, beside torch over diffusers' models: writes docs/performance.md.

    python benchmarks/speed.py                                  all jobs and sizes: some hours
    python benchmarks/speed.py --jobs decoder,prior --sizes 1   some of them
    python benchmarks/speed.py --quick                          tiny models, writes nothing: does everything still run?

Needs the environment of `make parity`, and quiet cores. The sides take turns within one run, so that what else the
machine does meets all of them. Figures are kept in docs/performance.json, those of each processor by themselves; a run
replaces those of its jobs and sizes.
"""

import ppdiffusers_train  # noqa: F401

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from check import make_folder  # noqa: E402
from speed_gate import Side  # noqa: E402
from speed_page import STEP_PATCHES, page  # noqa: E402

from ppdiffusers_train.cpu.environment import SETTINGS  # noqa: E402
from ppdiffusers_train.cpu.patches import PATCHES, VARIABLE  # noqa: E402

HERE, FIGURES, PAGE = ROOT / "benchmarks", ROOT / "docs" / "performance.json", ROOT / "docs" / "performance.md"
SCRIPTS = {
    "decoder": "kandinsky2_2/train_text_to_image_decoder",
    "prior": "kandinsky2_2/train_text_to_image_prior",
    "sdxl": "sdxl/train_text_to_image_sdxl",
    "lcm_lora": "lcm/train_lcm_distill_lora_sd_wds",
}
SIZES, TINY = (0.5, 1.0, 2.0), 0.01
AS_IT_COMES = {VARIABLE: "none"}
WITHOUT_TORCH = {"USE_TORCH": "0"}  # which ppdiffusers would import for nothing, and a user may not have
WARM_UP, NEVER = 2, 10_000  # the loop lays out all its steps before the first one


class Job:
    """One job at one size, in a folder of its own: its models, its data, and the commands of its sides."""

    def __init__(self, name: str, size: float, folder: Path, images: int):
        self.name, self.folder = name, folder
        run([HERE / "speed_models.py", folder, name, size])
        self.parameters = json.loads((folder / "parameters.json").read_text(encoding="utf-8"))
        self.photos = make_folder(folder / "photos", images)
        kandinsky = name in ("decoder", "prior")
        self.models = [folder / "prior", folder / "decoder"] if kandinsky else [folder]
        names = {"sdxl": ["pretrained_model_name_or_path"], "lcm_lora": ["pretrained_teacher_model"]}.get(
            name, ["pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path"]
        )
        self.flags = [f"--{flag}={model}" for flag, model in zip(names, self.models)]
        self.flags += [f"--train_data_dir={self.photos}", f"--resolution={64 if size == TINY else 128}", "--seed=0"]
        self.flags += ["--train_batch_size=4", "--dataloader_num_workers=1", f"--checkpointing_steps={NEVER}"]
        self.flags += [f"--cache_dir={folder / 'downloads'}"]
        if name in ("sdxl", "lcm_lora"):
            self.flags.append("--center_crop")
        if name == "lcm_lora":
            self.flags += ["--vae_encode_batch_size=1", "--loss_type=huber"]

    def paddle(self, what: str, *flags, steps=NEVER, compile=True, environment=None) -> Side:
        """A side that computes with Paddle."""
        script = ROOT / "examples" / f"{SCRIPTS[self.name]}.py"
        own = ["--script", script, "--samples", self.folder / "samples.npz", *(["--compile"] if compile else [])]
        output = ["--overwrite_output_dir", f"--output_dir={self.folder / 'out'}"]
        command = [sys.executable, HERE / "speed_paddle.py", what, *own, "--", *self.flags, *output, *flags]
        return Side([*command, f"--max_train_steps={steps}"], environment_of(**WITHOUT_TORCH, **(environment or {})))

    def torch(self) -> Side:
        samples = [self.folder / "samples.npz", self.photos]
        return Side([sys.executable, HERE / "speed_torch.py", self.name, *samples, *self.models], environment_of())

    def cached(self, patches=None) -> Side:
        """Our run from the warm cache."""
        environment = {} if patches is None else {VARIABLE: patches}
        return self.paddle("loop", *self.cache, environment=environment)

    @property
    def cache(self) -> list:
        return [f"--encoded_cache_dir={self.folder / 'encoded'}"]

    def fill_cache(self) -> dict:
        """Fill the cache in a process of its own; what it answered. Writes the samples for the others, too."""
        side = self.paddle("cache", *self.cache, steps=1)
        try:
            return side.listen()
        finally:
            side.end()


def environment_of(**more) -> dict:
    """The environment without settings of processors, but those given; bytecode is kept, as on a user's machine."""
    dropped = (*SETTINGS, VARIABLE, "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def run(arguments: list, **environment) -> float:
    """Seconds that a Python process takes."""
    command, start = [sys.executable, *map(str, arguments)], time.perf_counter()
    subprocess.run(command, env=environment_of(**environment), check=True, capture_output=True)
    return time.perf_counter() - start


def in_turns(sides: dict, turns: int, steps: int) -> dict:
    """{side: {"seconds": of a step in each turn, "peak_mb"}}: every turn goes through all sides, each the other way."""
    try:
        for side in sides.values():
            side.ask(WARM_UP)
        for turn in range(turns):
            for name in list(sides) if turn % 2 else list(sides)[::-1]:
                sides[name].measure(steps)
    finally:
        for side in sides.values():
            side.end()
    return {name: {"seconds": side.seconds, "peak_mb": side.peak_mb} for name, side in sides.items()}


def measure_job(job: Job, turns: int, steps: int) -> dict:
    """The whole job: ours with a warm cache and without one, torch's, and Paddle's as it comes."""
    figures = {"parameters": job.parameters, "cache": job.fill_cache()}
    sides = {
        "torch": job.torch(),
        "cached": job.cached(),
        "online": job.paddle("loop", "--no_encoded_cache"),
        "as it comes": job.paddle("plain", compile=False, environment=AS_IT_COMES),
    }
    return {**figures, "sides": in_turns(sides, turns, steps)}


def measure_patches(job: Job, turns: int, steps: int) -> dict:
    """Each patch alone against none, and all: in the step from the warm cache, and for encoders online."""
    sides = {name: job.cached(patches=name) for name in ("none", *STEP_PATCHES, ",".join(STEP_PATCHES))}
    for name, compile in (("online, plain encoders", False), ("online, compiled encoders", True)):
        environment = {VARIABLE: ",".join(PATCHES)}  # whether or not the processor usually compiles
        sides[name] = job.paddle("loop", "--no_encoded_cache", compile=compile, environment=environment)
    return in_turns(sides, turns, steps)


def measure_profile(job: Job) -> dict:
    """{"none" and "patches": {kernel: milliseconds of a step}} from the warm cache."""
    found = {}
    for name, environment in (("none", {VARIABLE: "none"}), ("patches", {})):
        side = job.paddle("profile", *job.cache, environment=environment)
        try:
            found[name] = side.listen()["milliseconds"]
        finally:
            side.end()
    return found


def measure_start(job: Job) -> dict:
    """Seconds until a script answers, in processes of their own, beside what the libraries take by themselves."""
    script = ROOT / "examples" / f"{SCRIPTS[job.name]}.py"
    bare = ["-c", "import ppdiffusers.pipelines, ppdiffusers.transformers"]
    # What the job does first, without the loop: it imports, reads its flags and loads its models.
    load = "import pathlib, sys; from tests.conftest import load_script, module_class; "
    load += "job = load_script(pathlib.Path(sys.argv[1])); "
    load += "module_class(job)(job.build_parser().parse_args(sys.argv[2:]))"
    answer = partial(run, **WITHOUT_TORCH)
    answer(bare)  # its bytecode is written the first time
    side = job.cached()
    start = time.perf_counter()
    side.ask(1)
    first_step = time.perf_counter() - start
    side.end()
    return {
        "ppdiffusers-train --help": answer(["-m", "ppdiffusers_train.cli", "--help"]),
        "a script's --help": answer([script, "--help"]),
        "import of ppdiffusers by itself": answer(bare),
        "import, and loading the models": answer(["-c", load, script, *job.flags]),
        "start to first step": first_step,
    }


def processor() -> str:
    """What the figures are of: model and number of cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(named or [platform.processor()])[0]}, {os.cpu_count()} cores"


def numbers(text: str) -> list:
    return [float(number) for number in text.split(",")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", default=",".join(SCRIPTS), help="some of them, separated by commas")
    parser.add_argument("--sizes", type=numbers, default=list(SIZES), help="times the parameters, such as 0.5,1")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=4, help="steps of a measurement")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--details", action="store_true", help="also patches, kernels and start, at size 1")
    parser.add_argument("--quick", action="store_true", help="tiny models, all parts, writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.turns, args.steps, args.images, args.details = [TINY], 1, 1, 8, True
    kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    figures = kept.setdefault(processor(), {})
    for name in args.jobs.split(","):
        for size in args.sizes:
            with tempfile.TemporaryDirectory() as folder:
                job = Job(name, size, Path(folder), args.images)
                found = measure_job(job, args.turns, args.steps)
                if args.details and size in (1.0, TINY):
                    found["patches"] = measure_patches(job, args.turns, args.steps)
                    found["profile"] = measure_profile(job)
                    found["start"] = measure_start(job)
            previous = figures.setdefault(name, {}).get(f"{size:g}", {})
            figures[name][f"{size:g}"] = {**previous, **found}
            if not args.quick:  # what is measured is kept, whatever comes after it
                FIGURES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
                PAGE.write_text(page(kept), encoding="utf-8")
            medians = {side: statistics.median(measured["seconds"]) for side, measured in found["sides"].items()}
            print(f"{name} x{size:g}: " + ", ".join(f"{side} {value:.2f} s" for side, value in medians.items()))
            cache = found["cache"]
            print(f"  the cache, once: {cache['seconds'] / cache['samples']:.2f} s a sample", flush=True)
    if args.quick:
        print(page({processor(): figures}))


if __name__ == "__main__":
    main()
