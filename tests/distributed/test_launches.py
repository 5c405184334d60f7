"""Starting two processes with Paddle's launcher, and what they do when one of them is stopped, hangs or fails."""

import ppdiffusers_train  # noqa: F401

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import encoded_samples, same
from tests.distributed.launching import (
    ONE,
    TWO,
    assert_close,
    endless_run,
    environment,
    launch,
    launch_command,
    launched,
    learned,
    runs_of,
    script,
    wait_for,
)


def test_the_guides_form_of_the_command_and_a_bad_sample_and_the_cache(base_flags, tmp_path, photos, kandinsky_jobs):
    """`--gpus 0,1`, with the environment that makes CPUs stand in for cards. The bad sample is skipped on both ranks
    alike, and the two fill one cache."""
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
    assert len(encoded_samples(tmp_path / "cache")) == 6


@pytest.mark.slow
def test_a_checkpoint_that_takes_longer_than_the_launcher_waits_is_not_lost(base_flags, tmp_path):
    """Each file's way to the disk takes ten seconds. The next run starts when the launcher has ended."""
    flags = [*base_flags, *TWO, "--sharding_degree=2", "--max_train_steps=12", "--checkpointing_steps=6"]
    resumed = [*flags, f"--output_dir={tmp_path / 'out'}", "--resume_from_checkpoint=latest"]
    slow = Path(__file__).with_name("slow_machine.py")
    command = launch_command(slow, *resumed, "--checkpointing_steps=100", log_dir=tmp_path / "log")
    variables = {"SECONDS_PER_BATCH": "2", "SECONDS_PER_FILE": "10"}
    with launched(command, tmp_path, **variables) as launcher:
        wait_for(lambda: " 2/12 " in (tmp_path / "said").read_text())
        runs, start = runs_of(launcher.pid), time.monotonic()
        launcher.terminate()
        assert launcher.wait(60) == signal.SIGTERM
    print(f"the launcher has ended after {time.monotonic() - start:.0f} s")
    assert not list((tmp_path / "out").glob("checkpoint-*")), "else this test shows nothing"
    said = launch(tmp_path / "next", [("prior", resumed)])
    assert said.count("another run still writes there") == 1 and "at step 0" not in said, said
    written = (tmp_path / "log" / "workerlog.1").read_text().splitlines()[-1]
    print(f"{written}; the checkpoint and the next run have taken {time.monotonic() - start:.0f} s")
    assert written.startswith("SIGTERM: wrote ") and not [run for run in runs if Path(f"/proc/{run}").exists()]
    launch(tmp_path / "whole", [("prior", [*flags, f"--output_dir={tmp_path / 'whole'}"])])
    assert same(learned("prior", tmp_path / "whole"), learned("prior", tmp_path / "out"))


@pytest.mark.once
def test_a_rank_that_hangs_is_told_by_the_one_that_waits(base_flags, tmp_path):
    with endless_run(base_flags, tmp_path, "--collective_timeout=6") as (launcher, _):
        os.kill(runs_of(launcher.pid)[1], signal.SIGSTOP)
        start = time.monotonic()
        launcher.wait(60)
        assert time.monotonic() - start < 40
    said = (tmp_path / "log" / "workerlog.0").read_text()
    assert "rank 0 of 2, step " in said and ": waited 6 s for " in said
    # Which one it is can be seen while it has not yet come to a collective, but not in the middle of one.
    assert "without a sign of life from rank 1" in said or "and another rank did not come" in said


@pytest.mark.once
def test_the_rank_that_fails_ends_the_others_and_has_the_final_message(base_flags, tmp_path):
    flags = [*base_flags, *TWO, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=100000"]
    token = "not-even-like-a-token-of-the-hub"
    start = time.monotonic()
    done = subprocess.run(
        launch_command(Path(__file__).with_name("fails_on_rank_one.py"), *flags, log_dir=tmp_path / "log"),
        env=environment(HF_TOKEN=token), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert done.stdout.splitlines()[-1] == "rank 1: OSError: the GPU has fallen off the bus, says ***"
    said = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    assert (
        "Traceback" in said[1]
        and said[1].endswith("OSError: the GPU has fallen off the bus, says ***\n")
        and token not in done.stdout
    )
    ended = "rank 0 of 2, step 3: rank 1 has ended while this one waited for "
    assert "Traceback" not in said[0] and (ended in said[0] or "error" not in said[0]), said[0]


@pytest.mark.once
@pytest.mark.parametrize("on_save_error, status", [("continue", 0), ("stop", 1)])
def test_a_disk_that_is_full_for_one_ranks_share_is_told_and_nobody_waits(base_flags, tmp_path, on_save_error, status):
    flags = [*base_flags, *TWO, f"--output_dir={tmp_path / 'out'}", "--max_train_steps=2", "--checkpointing_steps=1"]
    flags += ["--sharding_degree=2", f"--on_save_error={on_save_error}", "--collective_timeout=60"]
    start = time.monotonic()
    done = subprocess.run(
        launch_command(Path(__file__).with_name("full_disk_on_rank_one.py"), *flags, log_dir=tmp_path / "log"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    said = (tmp_path / "log" / "workerlog.0").read_text()
    assert bool(done.returncode) == bool(status) and time.monotonic() - start < 120, said
    told = f"checkpoint-1 cannot be written to '{tmp_path / 'out'}': rank 1: File too large"
    assert told in said and "Traceback" not in said + (tmp_path / "log" / "workerlog.1").read_text()
    assert not list((tmp_path / "out").glob("*checkpoint*")), "no half-written folder is left"
    if on_save_error == "continue":
        assert said.count("; continuing") == 2 and learned("prior", tmp_path / "out")


@pytest.mark.once
def test_a_mistake_is_said_once_and_last(base_flags, tmp_path):
    flags = [*base_flags, f"--output_dir={tmp_path / 'out'}", "--train_data_dir=nowhere"]
    done = subprocess.run(
        launch_command(script("prior"), *flags, log_dir=tmp_path / "log"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("train_text_to_image_prior.py: error: --train_data_dir: ") and "nowhere" in lines[-1]
    assert "Exit code" in lines[-3] and done.returncode != 0


@pytest.mark.once
def test_processes_started_for_gpus_that_are_not_there_are_told_how_to_start(base_flags, tmp_path):
    done = subprocess.run(
        [sys.executable, script("prior"), *base_flags, f"--output_dir={tmp_path / 'out'}"],
        env=environment(PADDLE_TRAINERS_NUM="2", PADDLE_TRAINER_ID="0"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "2 processes were started for GPUs" in done.stderr.splitlines()[-1]
