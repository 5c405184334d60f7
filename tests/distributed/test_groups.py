"""More than two ranks on this CPU find each other, and notice when one is gone."""

import ppdiffusers_train  # noqa: F401

import re
import subprocess
import time
from pathlib import Path

from tests.distributed.launching import environment, launch_command


def test_four_ranks_start_and_halves_sum_among_themselves_and_a_kill_ends_all(tmp_path):
    worker = Path(__file__).with_name("start_worker.py")
    command = launch_command(worker, form=("--nproc_per_node", "4"), log_dir=tmp_path)
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    said = done.stdout + "".join(path.read_text() for path in tmp_path.glob("workerlog.*"))
    expected = [[1111, 11, 101], [1111, 11, 1010], [1111, 1100, 101], [1111, 1100, 1010]]
    assert f"sums: {expected}" in done.stdout, said
    assert done.stdout.splitlines()[-1].startswith("rank 3 was killed by SIGKILL (9)"), said
    assert done.returncode != 0 and time.time() - float(re.search("killed at: (.*)", done.stdout)[1]) < 20, said
