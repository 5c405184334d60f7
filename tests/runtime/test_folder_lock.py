"""One run at a time in a folder: claims of processes here, and of those of other machines, which a file stands for."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime import folder_lock
from ppdiffusers_train.runtime.folder_lock import AT_WORK, CLAIMING, ENDING, LOOK_SECONDS, PREFIX, SIZE, FolderLock
from tests.conftest import ROOT

pytestmark = pytest.mark.once  # no Paddle in it

HOLDS = """
import sys, time
from pathlib import Path
from ppdiffusers_train.runtime.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1]), resumes=True) as lock:
    print("held", flush=True)
    for seconds in sys.argv[2:]:
        time.sleep(float(seconds))
        lock.is_ending = True
"""
REFUSED = r"--output_dir: '.*': another run is at work there \(process \d+ of .+\); expected its end, or another folder"


@pytest.fixture
def another_run(tmp_path):
    runs = []

    def start(*seconds):
        """A process that is at work for the first number of seconds, and about to end for the others."""
        command = [sys.executable, "-c", HOLDS, tmp_path, *map(str, seconds)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert runs[-1].stdout.readline() == "held\n"
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def hold(folder, resumes, log=pytest.fail):
    with FolderLock(folder, resumes, log):
        pass


def claim(folder, state, name="0", machine=7, process=1):
    """The claim of a process of another machine."""
    content = {"machine": machine, "process": process, "started": "1", "host": "node-7", "state": state}
    file = folder / f"{PREFIX}{name}"
    file.write_bytes(json.dumps(content).encode().ljust(SIZE))
    return file


@pytest.mark.parametrize("resumes", [True, False])
def test_a_run_is_refused_at_once_where_another_is_at_work(another_run, tmp_path, resumes):
    other, start = another_run(60), time.monotonic()
    with pytest.raises(UserError, match=REFUSED) as refused:
        hold(tmp_path, resumes)
    assert time.monotonic() - start < 1 and f"(process {other.pid} of " in str(refused.value)
    assert other.poll() is None and len(list(tmp_path.iterdir())) == 1


def test_a_run_that_resumes_waits_for_one_that_was_asked_to_stop_and_says_so_once(another_run, tmp_path):
    said = []
    another_run(0, 2)
    time.sleep(2 * LOOK_SECONDS)
    start = time.monotonic()
    hold(tmp_path, True, said.append)
    assert time.monotonic() - start > 1
    assert said == [f"{str(tmp_path)!r}: another run still writes there; waiting for its end"]
    assert not list(tmp_path.iterdir())


def test_a_new_run_does_not_wait_for_one_that_was_asked_to_stop(another_run, tmp_path):
    another_run(0, 60)
    with pytest.raises(UserError, match=REFUSED):
        hold(tmp_path, False)


@pytest.mark.parametrize("reused", [False, True])
def test_what_a_killed_run_has_left_holds_nobody_up(another_run, tmp_path, reused):
    """Also where the number of its process is another one's by now."""
    other = another_run(60)
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    (file,) = tmp_path.iterdir()
    if reused:
        content = json.loads(file.read_bytes())
        file.write_bytes(json.dumps({**content, "process": os.getpid()}).encode())
    start = time.monotonic()
    hold(tmp_path, False)
    assert time.monotonic() - start < 1 and not list(tmp_path.iterdir())


def test_a_run_of_another_machine_is_alive_while_its_claim_changes(tmp_path):
    file, over = claim(tmp_path, AT_WORK), threading.Event()

    def beat():
        beats = 0
        while not over.wait(1.5):
            beats += 1
            file.write_bytes(json.dumps({**json.loads(file.read_bytes()), "beats": beats}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    said, start = [], time.monotonic()
    try:
        with pytest.raises(UserError, match=r"\(process 1 of node-7\)"):
            hold(tmp_path, True, said.append)
    finally:
        over.set()
        thread.join()
    assert time.monotonic() - start < 5 and file.exists()
    assert said == [f"{str(tmp_path)!r}: another run was there, on node-7; it has 30 s to show that it is at work"]


@pytest.mark.parametrize("state", [CLAIMING, AT_WORK, ENDING])
def test_a_run_of_another_machine_is_over_when_its_claim_no_longer_changes(tmp_path, state, monkeypatch):
    monkeypatch.setattr(folder_lock, "DEAD_SECONDS", 1.0)
    file, start = claim(tmp_path, state), time.monotonic()
    hold(tmp_path, False, lambda line: None)
    assert time.monotonic() - start > 1 and not file.exists()


def test_a_claim_that_cannot_be_read_is_of_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "DEAD_SECONDS", 0.5)
    (tmp_path / f"{PREFIX}1").write_text("no JSON")
    (tmp_path / f"{PREFIX}2").write_text("[]")
    hold(tmp_path, False, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_of_many_that_come_at_once_one_has_the_folder(tmp_path):
    held, refused = [], []

    def compete():
        command = [sys.executable, "-c", HOLDS, tmp_path, "1.5"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        (held if run.stdout == "held\n" else refused).append(run.stderr)

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and all(re.search(REFUSED, error) for error in refused)


def test_a_claim_that_changes_while_it_is_held_is_renewed_and_made_again_in_an_emptied_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    with FolderLock(tmp_path, False):
        (file,) = tmp_path.iterdir()
        before = file.read_bytes()
        time.sleep(1)
        assert len(before) == SIZE == len(file.read_bytes()) and file.read_bytes() != before
        file.unlink()
        time.sleep(1)
        assert file.exists()
    assert not list(tmp_path.iterdir())


def test_a_run_whose_folder_another_has_taken_ends_before_it_writes_there_again(another_run, tmp_path):
    other = another_run(60)
    (file,) = tmp_path.iterdir()
    taken = claim(tmp_path, AT_WORK)
    file.unlink()
    assert other.wait(10) == 1 and list(tmp_path.iterdir()) == [taken]
