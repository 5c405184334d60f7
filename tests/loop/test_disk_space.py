"""What disk a run needs is told before its first step, and is what it takes; a disk that is too small is refused."""

import ppdiffusers_train  # noqa: F401

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from tests.conftest import last_error

pytestmark = pytest.mark.once

Usage = namedtuple("Usage", "total used free")
UNITS = {"MB": 1e6, "GB": 1e9}


def told(said: str) -> dict:
    """{what: bytes} of the line about disks, and its own text."""
    (line,) = [line for line in said.splitlines() if line.startswith("disk: ")]
    found = re.findall(r"([\d.]+) (MB|GB) for (\d+ sample|\d+ checkpoint|the result)", line)
    return {what.split()[-1]: float(size) * UNITS[unit] for size, unit, what in found}, line


def size_of(folder) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and path.stat().st_nlink == 1)


@pytest.fixture
def small_disk(monkeypatch):
    """`small_disk({folder: free bytes})`: what the system tells of free space."""

    def have(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free[Path(path).name]))

    return have


NARROW = ["--save_format=diffusers", "--save_dtype=float16"]


@pytest.mark.parametrize("flags", [["--use_ema", "--checkpoints_total_limit=1"], ["--use_8bit_adam"], NARROW], ids=str)
def test_the_need_is_what_the_run_takes(train, tmp_path, capsys, flags):
    cache = tmp_path / "cache"
    out = train("prior", f"--encoded_cache_dir={cache}", "--checkpointing_steps=1", "--max_train_steps=2", *flags)
    needs, line = told(capsys.readouterr().out)
    checkpoints = list(out.glob("checkpoint-*"))
    # With a limit of one, there are two for a moment.
    assert " for 2 checkpoints of " in line and line.count(" are free") == 1
    assert needs["checkpoint"] == pytest.approx(2 * size_of(checkpoints[0]), rel=0.05)  # JSON and headers
    result = [path for path in out.iterdir() if path not in checkpoints and path.name != "logs"]
    assert needs["result"] == pytest.approx(sum(map(size_of, result)), rel=0.1)
    packs = sum(pack.stat().st_size for pack in cache.rglob("*.pack"))
    assert 0.5 * packs < needs["sample"] <= 1.1 * packs  # toys' samples are small beside the index of a pack
    more = ["--resume_from_checkpoint=latest", "--max_train_steps=3", "--checkpointing_steps=2"]
    train("prior", f"--encoded_cache_dir={cache}", *more, *flags)
    needs, line = told(capsys.readouterr().out)
    assert needs["sample"] == 0 and " for 1 checkpoint of " in line


def test_a_lora_is_small_and_its_result_no_pipeline(train, tmp_path, capsys):
    out = train("decoder_lora", "--max_train_steps=1")
    needs, _ = told(capsys.readouterr().out)
    assert needs["checkpoint"] == pytest.approx(size_of(out / "checkpoint-1"), rel=0.2) and needs["result"] < 1e6


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(train, small_disk, capsys, tmp_path):
    small_disk({"out": 3_000_000, "cache": 10**9})
    flags = ["--checkpointing_steps=1", "--max_train_steps=3", f"--encoded_cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit) as stopped:
        train("prior", *flags)
    message = last_error(capsys)
    assert stopped.value.code == 2
    size = r"\d\.\d\d MB"
    expected = (
        f"--output_dir: '.*/out': the run needs {size} on this disk \\({size} for 7 samples to encode, {size} for "
        f"3 checkpoints of {size}, {size} for the result\\), and 3.00 MB are free; expected more space or a smaller "
        "--checkpoints_total_limit"
    )
    assert re.search(expected, message), message
    assert not list((tmp_path / "out").iterdir()) and not list((tmp_path / "cache").rglob("*.pack"))
    train("prior", *flags[:2], "--checkpoints_total_limit=1", "--no_final_checkpoint", "--max_train_steps=1")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_each_disk_is_looked_at_by_itself(train, small_disk, capsys, tmp_path):
    cache = Path("/dev/shm") / f"{tmp_path.parent.name}-cache"
    try:
        small_disk({"out": 10**9, cache.name: 1000})
        with pytest.raises(SystemExit) as stopped:
            train("prior", f"--encoded_cache_dir={cache}")
        message = last_error(capsys)
        assert stopped.value.code == 2 and "--encoded_cache_dir: '/dev/shm/" in message and "more space" in message
        assert "checkpoint" not in message
        small_disk({"out": 10**9, cache.name: 10**8})
        train("prior", f"--encoded_cache_dir={cache}")
        _, line = told(capsys.readouterr().out)
        assert "100.00 MB are free)" in line and "1.00 GB are free)" in line
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def test_what_overwriting_frees_counts(train, small_disk, tmp_path):
    train("prior", "--max_train_steps=1")
    small_disk({"out": 1_500_000})  # without the old checkpoint, which is deleted before the first step
    train("prior", "--max_train_steps=1", "--overwrite_output_dir")


@pytest.mark.parametrize(
    "damage, message",
    [
        ("movq", "has no part 'movq'"),
        ("movq/diffusion_paddle_model.safetensors", "has no weights in movq/"),
        ("scheduler/scheduler_config.json", "has no configuration in scheduler/"),
    ],
)
def test_what_pictures_need_is_opened_before_the_first_step(train, kandinsky, tmp_path, capsys, damage, message):
    """The prior's job needs the decoder for its pictures alone."""
    decoder = shutil.copytree(kandinsky[1], tmp_path / "decoder")
    found = decoder / damage
    if found.is_dir():
        shutil.rmtree(found)
    else:
        found.unlink()
    flags = [f"--pretrained_decoder_model_name_or_path={decoder}", "--max_train_steps=1"]
    with pytest.raises(SystemExit) as stopped:
        train("prior", *flags, "--validation_prompt=a robot naruto")
    error = last_error(capsys)
    assert stopped.value.code == 2 and message in error, error
    assert not list((tmp_path / "out").glob("[a-z]*"))
    train("prior", *flags)


def test_weights_of_the_pictures_parts_are_opened_but_not_read(train, kandinsky, tmp_path, capsys):
    decoder = shutil.copytree(kandinsky[1], tmp_path / "decoder")
    file = decoder / "movq" / "diffusion_paddle_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    flags = [f"--pretrained_decoder_model_name_or_path={decoder}", "--max_train_steps=1", "--validation_prompt=a"]
    with pytest.raises(SystemExit) as stopped:
        train("prior", *flags)
    assert stopped.value.code == 2 and f"{file}: cannot be read as safetensors" in last_error(capsys)
