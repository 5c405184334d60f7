"""Runs that are killed at random moments: see `kill_harness.py`. `make torture` kills longer."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.torture
@pytest.mark.parametrize(
    "job, kills, double_kills",
    [("prior", 8, 4), ("lora_sd", 2, 0), ("lcm_sd", 0, 2)],  # the second generates class images
)
def test_kills_cost_no_bit_and_no_good_checkpoint(tmp_path, job, kills, double_kills):
    command = [sys.executable, "-m", "tests.distributed.kill_harness", f"--job={job}"]
    command += [f"--kills={kills}", f"--double_kills={double_kills}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.endswith(": the same bits")]
    assert [line.split()[:2] for line in said] == [[f"{job}:", str(count)] for count in (kills, double_kills) if count]
    assert all(int(line.split(", ")[1].split()[0]) > 0 for line in said), "some kills come after a new checkpoint"
    within = [int(line.split(", ")[2].split()[0]) for line in said]
    assert any(within) or job != "prior", "some kills come while a pack or an index is written"
