"""A run waits for another one that still writes into its folder."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.folder_lock import POLL_SECONDS, QUIET_SECONDS, folder_held, wait_for_folder
from tests.conftest import ROOT

pytestmark = pytest.mark.once  # no Paddle in it

HOLDS = """
import sys, time
from pathlib import Path
from ppdiffusers_train.runtime.folder_lock import folder_held
with folder_held(Path(sys.argv[1]), resumes=True):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def another_run(tmp_path):
    runs = []

    def start(seconds):
        command = [sys.executable, "-c", HOLDS, tmp_path, str(seconds)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert runs[-1].stdout.readline() == "held\n"
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def hold(folder, resumes, log):
    with folder_held(folder, resumes, log):
        pass


@pytest.mark.parametrize("use", [hold, wait_for_folder])
def test_the_next_run_waits_for_the_end_and_says_so_once(another_run, tmp_path, use):
    said, start = [], time.monotonic()
    another_run(seconds=3 * QUIET_SECONDS)
    use(tmp_path, True, said.append)
    assert time.monotonic() - start > 2.5 * QUIET_SECONDS
    assert said == [f"{str(tmp_path)!r}: another run still writes there; waiting for its end"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", [hold, wait_for_folder])
def test_a_run_that_does_not_resume_is_refused(another_run, tmp_path, use):
    other = another_run(seconds=60)
    with pytest.raises(UserError, match="--output_dir: .*: another run still writes there; expected another folder"):
        use(tmp_path, False, pytest.fail)
    assert other.poll() is None


def test_what_a_killed_run_has_left_holds_nobody_up(another_run, tmp_path):
    another_run(seconds=60).send_signal(signal.SIGKILL)
    start = time.monotonic()
    wait_for_folder(tmp_path, False, pytest.fail)
    hold(tmp_path, False, pytest.fail)
    assert time.monotonic() - start < 5 * POLL_SECONDS and not list(tmp_path.iterdir())


def test_a_folder_that_nobody_holds_is_free_at_once_and_left_as_it_is(tmp_path):
    wait_for_folder(tmp_path, False, pytest.fail)
    assert not list(tmp_path.iterdir())


def test_two_that_wait_come_one_after_the_other(another_run, tmp_path):
    another_run(seconds=0.5)
    another_run(seconds=0.5)  # which has waited for the first one
    start = time.monotonic()
    hold(tmp_path, True, pytest.fail)
    assert time.monotonic() - start > 0.3
