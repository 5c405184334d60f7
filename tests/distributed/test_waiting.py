"""Two ranks, of which one takes long, hangs or ends: the other one waits as long as there are signs of life."""

import ppdiffusers_train  # noqa: F401

import contextlib
import json
import os
import signal
import time

import pytest

from tests.conftest import encoded_samples
from tests.distributed import waiting_worker
from tests.distributed.kill_harness import start
from tests.distributed.waiting_worker import LONGER

pytestmark = pytest.mark.once  # counters in the store, and a system's count of work
TIMEOUT = 2


def run(scenario, folder, ranks=2, first=0, timeout=TIMEOUT):
    """Returns the status of the rank that is waited for first, seconds until it ended, and what all said."""
    log = folder / "log"
    log.touch()
    processes, began = start(waiting_worker, [scenario, timeout, folder], ranks, log), time.monotonic()
    try:
        status = wait_for(processes[first])
        seconds = time.monotonic() - began
        others = [process for process in processes if process != processes[first]]
        if status == 0:
            assert [wait_for(process) for process in others] == [0] * len(others), log.read_text()
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
    return status, seconds, log.read_text()


def wait_for(process, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    raise AssertionError("it does not end")


def test_work_may_last_for_several_timeouts_as_long_as_it_goes_on(tmp_path):
    status, seconds, said = run("work_long", tmp_path)
    assert status == 0 and seconds > 2 * LONGER * TIMEOUT, said


def test_a_timeout_above_gloos_own_holds(tmp_path):
    status, seconds, said = run("sleep_beyond_gloo", tmp_path, timeout=60)
    assert status == 0 and seconds > 31, said


def test_questions_are_answered_while_paddle_waits_in_the_store(tmp_path):
    status, seconds, said = run("ask_beside_paddle", tmp_path)
    assert status == 0 and seconds < 20, said


@pytest.mark.parametrize(
    "scenario, survivor, told",
    [
        ("hang_on_one", 0, "waited 2 s for a share of something without a sign of life from rank 1"),
        ("kill_one", 0, "rank 0 of 2, step 1: rank 1 has ended while this one waited for a sum"),
        ("stop_zero", 1, "waited 2 s for a checkpoint without a sign of life from rank 0"),
        ("kill_zero", 1, "rank 1 of 2, step 1: rank 0 has ended while this one waited for a checkpoint"),
        ("fail_on_zero", 1, "rank 1 of 2, step 1: rank 0 failed while this one waited for a checkpoint"),
    ],
)
def test_a_rank_that_hangs_or_ends_is_named(tmp_path, scenario, survivor, told):
    status, seconds, said = run(scenario, tmp_path, first=survivor)
    assert status == 1 and told in said and seconds < 15, said


def test_a_fill_is_shared_out_by_speed_to_the_same_bits(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder, ranks in ((alone, 1), (together, 2)):
        folder.mkdir()
        status, _, said = run("fill", folder, ranks)
        assert status == 0 and "40 of 40 samples are still to be encoded" in said, said
        assert said.count("skipped, 1 of at most 1 bad samples: row 3 is spoiled") == 1
        assert "encoding: 40/40 samples" in said
    parts = [json.loads((together / f"rank {rank} of 2").read_text()) for rank in (0, 1)]
    assert [part["bad"] for part in parts] == [[3], [3]]
    fast, slow = (part["encoded"] for part in parts)
    assert fast + slow == 38 and fast > 2 * slow, (fast, slow)
    entries = encoded_samples(alone / "cache")
    assert len(entries) == 38 and entries == encoded_samples(together / "cache")
