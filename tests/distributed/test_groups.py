"""More than two ranks on this CPU find each other."""

import ppdiffusers_train  # noqa: F401

import subprocess
from pathlib import Path

from tests.distributed.launching import environment, launch_command


def test_four_ranks_start_and_halves_sum_among_themselves(tmp_path):
    worker = Path(__file__).with_name("start_worker.py")
    command = launch_command(worker, form=("--nproc_per_node", "4"), log_dir=tmp_path)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    said = done.stdout + done.stderr + "".join(path.read_text() for path in tmp_path.glob("workerlog.*"))
    expected = [[1111, 11, 101], [1111, 11, 1010], [1111, 1100, 101], [1111, 1100, 1010]]
    assert done.returncode == 0 and f"sums: {expected}" in done.stdout, said
