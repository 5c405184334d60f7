"""How tests start runs of two processes on this CPU, with Paddle's launcher."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ppdiffusers_train.launcher import watched_ranks
from tests.conftest import KANDINSKY, LCM, ROOT, tensors, weights

WORKER = Path(__file__).with_name("worker.py")
STEPS = 20
# Some gradients are zero but for rounding, of which AdamW makes full steps; an epsilon above it keeps those still.
COMMON = ["--learning_rate=1e-3", "--adam_epsilon=1e-4", f"--max_train_steps={STEPS}", "--checkpointing_steps=10"]
ONE = ["--train_batch_size=2", "--gradient_accumulation_steps=2"]
TWO = ["--train_batch_size=1", "--gradient_accumulation_steps=2"]
OTHERS = {  # scripts whose names do not say their folder
    "sd": "stable_diffusion/train_text_to_image.py",
    "lora_sd": "stable_diffusion/train_text_to_image_lora.py",
    "vae_decoder": "your_own_job/train_vae_decoder.py",
    "lora_qwen": "qwen_image/train_qwen_image_lora.py",
}


def launch_command(*arguments, form=("--nproc_per_node", "2"), log_dir="log"):
    return [sys.executable, "-m", "paddle.distributed.launch", *form, "--log_dir", str(log_dir), *map(str, arguments)]


def environment(**more):
    names = ("PADDLE_", "FLAGS_", "MKL_NUM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def script(name):
    """The file of a job."""
    if name in OTHERS:
        return ROOT / "examples" / OTHERS[name]
    if "lcm" in name:
        return LCM / f"train_{name}_wds.py"
    folder = next((family for family in ("sdxl", "sd3") if family in name), KANDINSKY.name)
    return ROOT / "examples" / folder / f"train_text_to_image_{name}.py"


def launch(folder, jobs, form=("--nproc_per_node", "2"), **more):
    """Run [(name of a job, flags)] one after another on two ranks; returns what rank 0 and the launcher said."""
    done, everything = launch_all(folder, [(script(name), flags) for name, flags in jobs], form, **more)
    assert "ended with status" not in everything, everything
    return done


def launch_all(folder, jobs, form=("--nproc_per_node", "2"), **more):
    """Run [(script, flags)] one after another on two ranks, also when some fail; returns what rank 0 and the launcher
    said, and what all said."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = [[str(file), list(map(str, flags))] for file, flags in jobs]
    (folder / "jobs.json").write_text(json.dumps(spec))
    done = subprocess.run(
        launch_command(WORKER, folder / "jobs.json", form=form, log_dir=folder / "log"),
        env=environment(**more), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    everything = done.stdout + done.stderr + "".join(path.read_text() for path in folder.glob("log/workerlog.*"))
    assert done.returncode == 0, everything
    return done.stdout, everything


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children_of(process):
    """Numbers of a process's children."""
    try:
        return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except OSError:
        return []


def ranks_of(launcher):
    """Process numbers of a launcher's ranks, in order."""
    with contextlib.suppress(FileNotFoundError):
        ranks = {int(its["PADDLE_TRAINER_ID"]): process for process, its in watched_ranks.ranks_of(launcher).items()}
        return [ranks[rank] for rank in sorted(ranks)]
    return []


def runs_of(launcher):
    """Process numbers of what a launcher's ranks stand in for."""
    return [run for rank in ranks_of(launcher) for run in children_of(rank)]


@contextlib.contextmanager
def launched(command, folder, **variables):
    """A launcher at work, whose screen is the file `said` in a folder; afterwards it is gone, and its ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "said", "w") as said:
        launcher = subprocess.Popen(command, env=environment(**variables), stdout=said, stderr=said)
    try:
        yield launcher
    finally:
        for process in [*runs_of(launcher.pid), *ranks_of(launcher.pid), launcher.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


@contextlib.contextmanager
def endless_run(base_flags, tmp_path, *flags):
    """A run of two processes that has begun to write checkpoints: (its launcher, its two ranks' numbers)."""
    flags = [*base_flags, *TWO, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=100000", *flags]
    with launched(launch_command(script("prior"), *flags, log_dir=tmp_path / "log"), tmp_path) as launcher:
        wait_for(lambda: (tmp_path / "out" / "checkpoint-10").is_dir())
        yield launcher, ranks_of(launcher.pid)


def learned(name, folder):
    """What a job has written of its learning."""
    if "lora" in name:
        return tensors(folder / "paddle_lora_weights.safetensors")
    return weights(folder, {"prior": "prior", "sd3": "transformer", "vae_decoder": "vae"}.get(name, "unet"))


def assert_close(one, other, tolerance=1e-6):
    """That two dictionaries of arrays hold the same numbers."""
    assert one.keys() == other.keys()
    worst = max(np.abs(one[name] - other[name]).max() for name in one)
    assert worst < tolerance, worst
