"""Runs that are killed at random moments: see `kill_harness.py`. `make torture` kills longer."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.torture
def test_forty_kills_cost_no_bit_and_no_good_checkpoint(tmp_path):
    command = [sys.executable, "-m", "tests.distributed.kill_harness", "--kills=30", "--double_kills=10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.endswith(": the same bits")]
    assert [line.split()[0] for line in said] == ["30", "10"]
    assert all(int(line.split(", ")[1].split()[0]) > 0 for line in said), "some kills come after a new checkpoint"
