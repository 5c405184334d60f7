"""What people and machines do to several ranks: see `torture.py`. `make torture` does it longer, and to more ranks."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A scheduler's warning to one rank of two nodes, SIGINT to one of the wrapper's, the launcher's end, and what is cheap.
CASES = ["signal=11:12", "signal=6:7", "kill=6:7", "flag=2", "copy=1", "slow=1", "twice=1"]


@pytest.mark.torture
def test_ranks_that_are_disturbed_lose_no_bit_or_say_why(tmp_path):
    command = [sys.executable, "-m", "tests.distributed.torture", "--ranks", "2", "--seed", "1", "--cases", *CASES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "8 of 8 cases as they should be"
