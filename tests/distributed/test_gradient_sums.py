"""Gradients summed over two ranks on this CPU."""

import ppdiffusers_train  # noqa: F401

import subprocess
from pathlib import Path

from tests.distributed.launching import environment, launch_command


def test_sums_over_micro_batches_and_ranks_are_right_to_the_bit(tmp_path):
    """Whatever the ranks' batches use, whenever gradients come, in every type, with owners and without."""
    command = launch_command(Path(__file__).with_name("gradient_sums_worker.py"), log_dir=tmp_path)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    said = done.stdout + done.stderr + "".join(path.read_text() for path in tmp_path.glob("workerlog.*"))
    assert done.returncode == 0 and "all sums are right" in said, said
