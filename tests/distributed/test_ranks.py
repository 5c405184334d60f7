"""Runs of two processes on this CPU, started by Paddle's launcher: the same numbers as one process."""

import ppdiffusers_train  # noqa: F401

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import KANDINSKY, LCM, ROOT, optimizer_state, photo_shards, same, scalars, tensors, weights
from tests.distributed.kill_harness import free_port

WORKER = Path(__file__).with_name("worker.py")
STEPS, STEPS_OF_SDXL, STEPS_OF_LCM = 20, 8, 6
# Some gradients are zero but for rounding, of which AdamW makes full steps; an epsilon above it keeps those still.
COMMON = ["--learning_rate=1e-3", "--adam_epsilon=1e-4", f"--max_train_steps={STEPS}", "--checkpointing_steps=10"]
ONE = ["--train_batch_size=2", "--gradient_accumulation_steps=2"]
TWO = ["--train_batch_size=1", "--gradient_accumulation_steps=2"]


def launch_command(*arguments, form=("--nproc_per_node", "2"), log_dir="log"):
    return [sys.executable, "-m", "paddle.distributed.launch", *form, "--log_dir", str(log_dir), *map(str, arguments)]


def environment(**more):
    names = ("PADDLE_", "FLAGS_", "MKL_NUM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def script(name):
    """The file of a job."""
    if "lcm" in name:
        return LCM / f"train_{name}_wds.py"
    folder = next((family for family in ("sdxl", "sd3") if family in name), KANDINSKY.name)
    return ROOT / "examples" / folder / f"train_text_to_image_{name}.py"


def launch(folder, jobs, form=("--nproc_per_node", "2"), **more):
    """Run [(name of a job, flags)] one after another on two ranks; returns what rank 0 and the launcher said."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = [[str(script(name)), list(map(str, flags))] for name, flags in jobs]
    (folder / "jobs.json").write_text(json.dumps(spec))
    done = subprocess.run(
        launch_command(WORKER, folder / "jobs.json", form=form, log_dir=folder / "log"),
        env=environment(**more), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    everything = done.stdout + done.stderr + "".join(path.read_text() for path in folder.glob("log/workerlog.*"))
    assert done.returncode == 0 and "ended with status" not in everything, everything
    return done.stdout


@pytest.fixture(scope="module")
def base_flags(kandinsky, photos):
    prior, decoder = kandinsky
    return [
        f"--pretrained_decoder_model_name_or_path={decoder}",
        f"--pretrained_prior_model_name_or_path={prior}",
        f"--train_data_dir={photos}",
        *["--resolution=64", "--seed=0", *COMMON],
    ]


LCM_JOBS = ("lcm_distill_sd", "lcm_distill_lora_sd")
JOBS = ("decoder", "prior", "decoder_lora", "sdxl", "lora_sdxl", "sd3", "lora_sd3", *LCM_JOBS)


@pytest.fixture(scope="module")
def runs(base_flags, kandinsky_jobs, sdxl, sdxl_jobs, sd3, sd3_jobs, sd, lcm_jobs, photos, tmp_path_factory):
    """A folder with runs of one process (`one-…`) and of two (`two-…`), and some that changed in between."""
    root = tmp_path_factory.mktemp("runs")
    of_sdxl = [f"--pretrained_model_name_or_path={sdxl}", "--random_flip", "--cache_variants=2", *base_flags[2:]]
    of_sdxl += [f"--max_train_steps={STEPS_OF_SDXL}"]
    of_sd3 = [f"--pretrained_model_name_or_path={sd3}", *of_sdxl[1:], "--gradient_checkpointing"]
    shards = photo_shards(photos, root / "shards")
    of_lcm = [
        f"--pretrained_teacher_model={sd}",
        *base_flags[3:],
        f"--max_train_steps={STEPS_OF_LCM}",
        "--learning_rate=1e-4",
    ]
    of_lcm += [
        f"--train_shards_path_or_url=pipe:cat {shards}/{{0..2}}.tar",
        "--max_train_samples=7",
        "--gradient_checkpointing",
    ]

    def flags(out, *more):
        if "lcm" in out:
            return [*of_lcm, f"--output_dir={root / out}", *more]
        models = of_sdxl if "sdxl" in out else of_sd3 if "sd3" in out else base_flags
        return [*models, f"--output_dir={root / out}", f"--encoded_cache_dir={root / 'cache'}", *more]

    of_lcm_by_name = {f"lcm_distill_{name}": job for name, job in lcm_jobs.items()}
    for name in JOBS:
        {**kandinsky_jobs, **sdxl_jobs, **sd3_jobs, **of_lcm_by_name}[name].main(flags(f"one-{name}", *ONE))
    kandinsky_jobs["prior"].main(flags("changed", *ONE, "--max_train_steps=10"))
    latest = "--resume_from_checkpoint=latest"
    root.joinpath("said").write_text(
        launch(
            root / "two",
            [
                *((name, flags(f"two-{name}", *TWO)) for name in JOBS),
                *(("lcm_distill_sd", flags("lcm_parts", *TWO, *more)) for more in (["--max_train_steps=3"], [latest])),
                ("prior", flags("changed", *TWO, "--max_train_steps=15", "--checkpointing_steps=15", latest)),
                ("prior", flags("parts", *TWO, "--max_train_steps=10")),
                ("prior", flags("parts", *TWO, latest)),
            ],
        )
    )
    kandinsky_jobs["prior"].main(flags("changed", *ONE, latest))
    return root


def learned(name, folder):
    if "lora" in name:
        return tensors(folder / "paddle_lora_weights.safetensors")
    return weights(folder, {"prior": "prior", "sd3": "transformer"}.get(name, "unet"))


def assert_close(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    worst = max(np.abs(one[name] - other[name]).max() for name in one)
    assert worst < tolerance, worst


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_accumulating_two_batches_of_one_equal_one_with_four(runs, name):
    """Seven samples: every other window is short, and the ranks' shares of it differ."""
    assert_close(learned(name, runs / f"one-{name}"), learned(name, runs / f"two-{name}"))
    assert scalars(runs / f"one-{name}") == pytest.approx(scalars(runs / f"two-{name}"), rel=1e-4)
    steps = STEPS_OF_SDXL if "sd" in name and "lcm" not in name else STEPS_OF_LCM if "lcm" in name else STEPS
    assert len(scalars(runs / f"two-{name}")) == steps
    if name == "lcm_distill_sd":
        assert_close(weights(runs / f"one-{name}", "unet_target"), weights(runs / f"two-{name}", "unet_target"))


def test_a_run_on_one_then_two_then_one_process_equals_an_uninterrupted_one(runs):
    assert_close(learned("prior", runs / "one-prior"), learned("prior", runs / "changed"))


def test_a_resumed_run_of_two_processes_ends_in_the_same_bits(runs):
    assert same(learned("prior", runs / "two-prior"), learned("prior", runs / "parts"))
    checkpoints = [runs / folder / "checkpoint-20" for folder in ("two-prior", "parts")]
    assert same(*map(optimizer_state, checkpoints))


def test_a_resumed_stream_of_two_processes_ends_in_the_same_bits(runs):
    for part in ("unet", "unet_target"):
        assert same(weights(runs / "two-lcm_distill_sd", part), weights(runs / "lcm_parts", part))


def test_two_machines_train_to_the_bits_of_one_with_two_processes(runs, base_flags, tmp_path):
    """Two launchers that meet on this one, as `--master` and `--nnodes` have it."""
    flags = [*base_flags, *TWO, f"--output_dir={tmp_path / 'out'}", f"--encoded_cache_dir={runs / 'cache'}"]
    launchers = []
    master = f"127.0.0.1:{free_port()}"
    for rank in ("0", "1"):
        form = ("--master", master, "--nnodes", "2", "--rank", rank, "--nproc_per_node", "1")
        command = launch_command(script("prior"), *flags, form=form, log_dir=tmp_path / f"log{rank}")
        said = open(tmp_path / f"said{rank}", "w")
        launchers.append(subprocess.Popen(command, env=environment(), stdout=said, stderr=said))
    try:
        assert [process.wait(200) for process in launchers] == [0, 0], (tmp_path / "said0").read_text()[-3000:]
    finally:
        for process in launchers:
            process.kill()
    assert same(learned("prior", runs / "two-prior"), learned("prior", tmp_path / "out"))


def test_only_rank_zero_speaks_and_writes(runs):
    said = (runs / "said").read_text()
    assert said.count("KandinskyDecoderTrainingModule: ") == 1 and said.count("wrote the result to ") == len(JOBS) + 5
    assert "wrote" not in (runs / "two" / "log" / "workerlog.1").read_text()


def test_sharding_the_optimizer_changes_nothing_and_its_checkpoints_load_at_any_degree(
    runs, base_flags, kandinsky_jobs, tmp_path
):
    def flags(out, *more):
        return [*base_flags, f"--output_dir={tmp_path / out}", *more]

    shard = "--sharding_degree=2"
    resumed = f"--resume_from_checkpoint={runs / 'two-prior' / 'checkpoint-10'}"
    launch(tmp_path, [("prior", flags("whole", *TWO, shard)), ("prior", flags("resumed", *TWO, shard, resumed))])
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    shards = sorted(path.name for path in checkpoint.glob("optimizer*"))
    assert shards == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
    parts = [tensors(checkpoint / name) for name in shards]
    assert not set(parts[0]) & set(parts[1]), "each rank holds its own share"
    whole = optimizer_state(runs / "two-prior" / "checkpoint-10")
    assert_close({**parts[0], **parts[1]}, whole)
    for out in ("whole", "resumed"):
        assert_close(learned("prior", runs / "one-prior"), learned("prior", tmp_path / out))
    kandinsky_jobs["prior"].main(flags("again", *ONE, f"--resume_from_checkpoint={checkpoint}"))
    assert_close(learned("prior", runs / "one-prior"), learned("prior", tmp_path / "again"))


def test_the_guides_form_of_the_command_and_a_bad_sample_and_the_cache(base_flags, tmp_path, photos, kandinsky_jobs):
    """`--gpus 0,1`, with the environment that makes CPUs stand in for cards. The bad sample is skipped on both ranks
    alike, and the two fill one cache."""
    import shutil

    data = shutil.copytree(photos, tmp_path / "data")
    sorted(data.glob("*.jpg"))[2].write_bytes(b"no picture")
    flags = [*base_flags, f"--train_data_dir={data}", "--max_train_steps=6", "--max_bad_samples=1"]
    cache = f"--encoded_cache_dir={tmp_path / 'cache'}"
    said = launch(
        tmp_path,
        [
            ("prior", [*flags, *TWO, f"--output_dir={tmp_path / 'two'}"]),
            ("prior", [*flags, *TWO, f"--output_dir={tmp_path / 'cached'}", cache]),
        ],
        form=("--gpus", "0,1"), CUDA_VISIBLE_DEVICES="0,1", PADDLE_DISTRI_BACKEND="gloo",
    )  # fmt: skip
    kandinsky_jobs["prior"].main([*flags, *ONE, f"--output_dir={tmp_path / 'one'}"])
    assert said.count("skipped, 1 of at most 1 bad samples: ") == 2
    assert_close(learned("prior", tmp_path / "one"), learned("prior", tmp_path / "two"))
    assert same(learned("prior", tmp_path / "two"), learned("prior", tmp_path / "cached"))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6


@contextlib.contextmanager
def endless_run(base_flags, tmp_path, *flags):
    """A run of two processes that has begun to write checkpoints: (its launcher, its two ranks' numbers)."""
    flags = [*base_flags, *TWO, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=100000", *flags]
    with open(tmp_path / "said", "w") as said:
        command = launch_command(script("prior"), *flags, log_dir=tmp_path / "log")
        launcher = subprocess.Popen(command, env=environment(), stdout=said, stderr=said)
    ranks = []
    try:
        wait_for(lambda: (tmp_path / "out" / "checkpoint-10").is_dir())
        ranks = ranks_of(launcher.pid)
        yield launcher, ranks
    finally:
        launcher.kill()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):  # the launcher has ended it
                os.kill(rank, signal.SIGKILL)


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(base_flags, tmp_path):
    with endless_run(base_flags, tmp_path) as (launcher, ranks):
        os.kill(ranks[1], signal.SIGTERM)
        launcher.wait(60)
    newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    said = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    assert f"SIGTERM: wrote {newest}" in said[0], "".join(said)
    assert json.loads((newest / "state.json").read_text())["step"] == int(newest.name.split("-")[1])
    assert launcher.returncode != 0


def test_a_rank_that_hangs_is_told_by_the_one_that_waits(base_flags, tmp_path):
    with endless_run(base_flags, tmp_path, "--collective_timeout=3") as (launcher, ranks):
        os.kill(ranks[1], signal.SIGSTOP)
        start = time.monotonic()
        launcher.wait(60)
        assert time.monotonic() - start < 40
    said = (tmp_path / "log" / "workerlog.0").read_text()
    assert "rank 0 of 2, step " in said and ": waited 3 s for " in said and "another rank hangs or has ended" in said


def test_the_rank_that_fails_ends_the_others_and_has_the_last_word(base_flags, tmp_path):
    flags = [*base_flags, *TWO, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=100000"]
    start = time.monotonic()
    done = subprocess.run(
        launch_command(Path(__file__).with_name("fails_on_rank_one.py"), *flags, log_dir=tmp_path / "log"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert done.stdout.splitlines()[-1] == "rank 1: OSError: the card has fallen off the bus"
    said = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    assert "Traceback" in said[1] and said[1].endswith("OSError: the card has fallen off the bus\n")
    ended = "rank 0 of 2, step 3: another rank has ended while this one waited for "
    assert "Traceback" not in said[0] and (ended in said[0] or "error" not in said[0]), said[0]


def test_a_mistake_is_said_once_and_last(base_flags, tmp_path):
    flags = [*base_flags, f"--output_dir={tmp_path / 'out'}", "--train_data_dir=nowhere"]
    done = subprocess.run(
        launch_command(script("prior"), *flags, log_dir=tmp_path / "log"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("train_text_to_image_prior.py: error: --train_data_dir: ") and "nowhere" in lines[-1]
    assert "Exit code" in lines[-2] and done.returncode != 0


def test_processes_started_for_cards_that_are_not_there_are_told_how_to_start(base_flags, tmp_path):
    done = subprocess.run(
        [sys.executable, script("prior"), *base_flags, f"--output_dir={tmp_path / 'out'}"],
        env=environment(PADDLE_TRAINERS_NUM="2", PADDLE_TRAINER_ID="0"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "2 processes were started for cards" in done.stderr.splitlines()[-1]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ranks_of(launcher):
    """Process numbers of a launcher's ranks, in order."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0")
        rank = next((v.split("=")[1] for v in variables if v.startswith("PADDLE_TRAINER_ID=")), None)
        if rank is not None:
            ranks[int(rank)] = child
    return [ranks[rank] for rank in sorted(ranks)]
