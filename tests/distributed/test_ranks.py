"""Runs of two processes on this CPU, started by Paddle's launcher: the same numbers as one process."""

import ppdiffusers_train  # noqa: F401

import contextlib
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import optimizer_state, photo_shards, same, scalars, tensors, weights
from tests.distributed.kill_harness import free_port
from tests.distributed.launching import (
    ONE,
    STEPS,
    TWO,
    assert_close,
    launch,
    launch_command,
    launched,
    learned,
    wait_for,
)

pytestmark = pytest.mark.once  # test_launches.py compares two processes with one there

# Seven samples, four a step: two epochs, with a short window in each.
STEPS_OF_OTHERS = 4
LCM_JOBS = ("lcm_distill_sd", "lcm_distill_lora_sd")
JOBS = ("decoder", "prior", "decoder_lora", "lora_sd", "sdxl", "lora_sdxl", "sd3", "lora_sd3", *LCM_JOBS)


@pytest.fixture(scope="module")
def runs(base_flags, kandinsky_jobs, sdxl, sdxl_jobs, sd3, sd3_jobs, sd, sd_jobs, lcm_jobs, photos, tmp_path_factory):
    """A folder with runs of one process (`one-…`) and of two (`two-…`), and some that changed in between."""
    root = tmp_path_factory.mktemp("runs")
    of_sdxl = [f"--pretrained_model_name_or_path={sdxl}", "--random_flip", "--cache_variants=2", *base_flags[2:]]
    of_sdxl += [f"--max_train_steps={STEPS_OF_OTHERS}"]
    of_sd3 = [f"--pretrained_model_name_or_path={sd3}", *of_sdxl[1:], "--gradient_checkpointing"]
    of_sd = [f"--pretrained_model_name_or_path={sd}", *of_sdxl[1:], "--input_perturbation=0.1", "--train_text_encoder"]
    of_sd += ["--validation_split=0.2", "--validation_loss_steps=2", "--validation_inference_steps=2"]
    of_sd += ["--class_prompt=a cat", "--num_class_images=5"]
    shards = photo_shards(photos, root / "shards")
    of_lcm = [
        f"--pretrained_teacher_model={sd}",
        *base_flags[3:],
        f"--max_train_steps={STEPS_OF_OTHERS}",
        "--learning_rate=1e-4",
    ]
    of_lcm += [
        f"--train_shards_path_or_url=pipe:cat {shards}/{{0..2}}.tar",
        "--max_train_samples=7",
        "--gradient_checkpointing",
    ]

    def flags(out, *more):
        more = ["--lora_dropout=0.3", *more] if "lora" in out else more
        if "lcm" in out:
            return [*of_lcm, f"--output_dir={root / out}", *more]
        models = of_sdxl if "sdxl" in out else of_sd3 if "sd3" in out else of_sd if "_sd" in out else base_flags
        steps = [f"--max_train_steps={STEPS_OF_OTHERS}"] if "decoder" in out else []
        steps += [f"--class_data_dir={root / 'class' / out}"] if models is of_sd else []
        return [*models, f"--output_dir={root / out}", f"--encoded_cache_dir={root / 'cache'}", *steps, *more]

    of_lcm_by_name = {f"lcm_distill_{name}": job for name, job in lcm_jobs.items()}
    for name in JOBS:
        {**kandinsky_jobs, **sd_jobs, **sdxl_jobs, **sd3_jobs, **of_lcm_by_name}[name].main(flags(f"one-{name}", *ONE))
    kandinsky_jobs["prior"].main(flags("changed", *ONE, "--max_train_steps=10"))
    latest = "--resume_from_checkpoint=latest"
    root.joinpath("said").write_text(
        launch(
            root / "two",
            [
                *((name, flags(f"two-{name}", *TWO)) for name in JOBS),
                ("lcm_distill_sd", flags("lcm_parts", *TWO, "--max_train_steps=3", "--checkpointing_steps=3")),
                ("lcm_distill_sd", flags("lcm_parts", *TWO, latest)),
                ("prior", flags("changed", *TWO, "--max_train_steps=15", "--checkpointing_steps=15", latest)),
                ("prior", flags("parts", *TWO, "--max_train_steps=10")),
                ("prior", flags("parts", *TWO, latest)),
            ],
        )
    )
    kandinsky_jobs["prior"].main(flags("changed", *ONE, latest))
    return root


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_accumulating_two_batches_of_one_equal_one_with_four(runs, name):
    """Seven samples: every other window is short, and the ranks' shares of it differ."""
    assert_close(learned(name, runs / f"one-{name}"), learned(name, runs / f"two-{name}"))
    assert scalars(runs / f"one-{name}") == pytest.approx(scalars(runs / f"two-{name}"), rel=1e-4)
    assert len(scalars(runs / f"two-{name}")) == (STEPS if name == "prior" else STEPS_OF_OTHERS)
    if name == "lora_sd":  # of one sample, which is not trained on
        one, two = (scalars(runs / f"{count}-{name}", "validation/loss") for count in ("one", "two"))
        assert len(one) == 3 and one[0] == two[0] and one == pytest.approx(two, rel=1e-4)
        one, two = (sorted((runs / "class" / f"{count}-{name}").glob("*.png")) for count in ("one", "two"))
        assert len(one) == 5 and [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    if name == "lcm_distill_sd":
        assert_close(weights(runs / f"one-{name}", "unet_target"), weights(runs / f"two-{name}", "unet_target"))


def test_a_run_on_one_then_two_then_one_process_equals_an_uninterrupted_one(runs):
    assert_close(learned("prior", runs / "one-prior"), learned("prior", runs / "changed"))


def test_a_resumed_run_of_two_processes_ends_in_the_same_bits(runs):
    assert same(learned("prior", runs / "two-prior"), learned("prior", runs / "parts"))
    checkpoints = [runs / folder / "checkpoint-20" for folder in ("two-prior", "parts")]
    assert same(*map(optimizer_state, checkpoints))


def test_a_resumed_stream_of_two_processes_ends_in_the_same_bits(runs):
    checkpoint = runs / "lcm_parts" / "checkpoint-3"
    assert f"resumed from {checkpoint} at step 3" in (runs / "said").read_text()
    for part in ("unet", "unet_target"):
        assert same(weights(runs / "two-lcm_distill_sd", part), weights(runs / "lcm_parts", part))


def test_two_machines_that_are_stopped_and_go_on_train_to_the_bits_of_one_with_two_processes(
    runs, base_flags, tmp_path
):
    """Two launchers that meet on this one, as `--master` and `--nnodes` have it; only the second is told to stop. Steps
    take longer than it takes to say so three times."""
    flags = [*base_flags, *TWO, f"--output_dir={tmp_path / 'out'}", f"--encoded_cache_dir={runs / 'cache'}"]
    flags += ["--checkpointing_steps=2", "--resume_from_checkpoint=latest"]

    def start(both, seconds):
        master = f"127.0.0.1:{free_port()}"
        for rank in ("0", "1"):
            form = ("--master", master, "--nnodes", "2", "--rank", rank, "--nproc_per_node", "1")
            command = launch_command(slow_machine, *flags, form=form, log_dir=tmp_path / rank / "log")
            yield both.enter_context(launched(command, tmp_path / rank, SECONDS_PER_BATCH=seconds))

    slow_machine = Path(__file__).with_name("slow_machine.py")
    with contextlib.ExitStack() as both:
        launchers = list(start(both, "0.6"))
        wait_for((tmp_path / "out" / "checkpoint-2").is_dir)
        launchers[1].terminate()
        assert [launcher.wait(60) for launcher in launchers] == [128 + signal.SIGTERM, signal.SIGTERM]
    said = [next((tmp_path / rank / "log").glob("workerlog.*")).read_text() for rank in ("0", "1")]
    told = [line for text in said for line in text.splitlines() if "SIGTERM" in line]
    assert len(told) == 2 and told[0] == told[1] and told[0].startswith("SIGTERM: wrote "), said
    with contextlib.ExitStack() as both:
        assert [launcher.wait(200) for launcher in list(start(both, "0"))] == [0, 0], said
    said = (tmp_path / "0" / "said").read_text()
    assert "resumed from " in said and "at step 2\n" not in said, "the checkpoint is that of the signal"
    assert same(learned("prior", runs / "two-prior"), learned("prior", tmp_path / "out"))


def test_only_rank_zero_speaks_and_writes(runs):
    said = (runs / "said").read_text()
    assert said.count("Kandinsky 2.2 decoder: ") == 1 and said.count("wrote the result to ") == len(JOBS) + 5
    assert "wrote" not in (runs / "two" / "log" / "workerlog.1").read_text()


def test_sharding_changes_no_bit_and_its_checkpoints_load_at_any_degree(runs, base_flags, kandinsky_jobs, tmp_path):
    def flags(out, *more):
        return [*base_flags, f"--output_dir={tmp_path / out}", *more]

    shard = "--sharding_degree=2"
    resumed = f"--resume_from_checkpoint={runs / 'two-prior' / 'checkpoint-10'}"
    gradients = "--sharding_stage=2"
    factored = "--optimizer=adafactor", "--max_train_steps=3", "--checkpointing_steps=3"
    stranger = tmp_path / "whole" / ".shards-of-a-run-that-was-killed" / "optimizer-00003-of-00004.safetensors"
    stranger.parent.mkdir(parents=True)
    shutil.copy(runs / "two-prior" / "checkpoint-10" / "optimizer.safetensors", stranger)
    launch(
        tmp_path,
        [
            ("prior", flags("whole", *TWO, shard)),
            ("prior", flags("gradients", *TWO, shard, gradients)),
            ("prior", flags("resumed", *TWO, shard, gradients, resumed)),
            *(("prior", flags(out, *TWO, *more, *factored)) for out, more in (("alike", ()), ("factored", (shard,)))),
        ],
    )
    assert same(learned("prior", tmp_path / "alike"), learned("prior", tmp_path / "factored"))
    assert len(list((tmp_path / "factored" / "checkpoint-3").glob("optimizer-*"))) == 2
    checkpoint = tmp_path / "whole" / "checkpoint-10"
    shards = sorted(path.name for path in checkpoint.glob("optimizer*"))
    assert shards == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
    assert not list((tmp_path / "whole").glob(".*"))
    parts = [tensors(checkpoint / name) for name in shards]
    assert not set(parts[0]) & set(parts[1]), "each rank holds its own share"
    whole = optimizer_state(runs / "two-prior" / "checkpoint-10")
    assert_close({**parts[0], **parts[1]}, whole)
    for out in ("whole", "gradients", "resumed"):
        assert same(learned("prior", runs / "two-prior"), learned("prior", tmp_path / out))
    kandinsky_jobs["prior"].main(flags("again", *ONE, f"--resume_from_checkpoint={checkpoint}"))
    assert_close(learned("prior", runs / "one-prior"), learned("prior", tmp_path / "again"))
