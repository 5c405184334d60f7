"""What remains of a run that a launcher started: its last line, its status, its logs, and no token in them."""

import ppdiffusers_train  # noqa: F401

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import environment, launch_command, ranks_of, wait_for

RANK = Path(__file__).with_name("launched_rank.py")
TOKEN = "no\"token\\of'the hub"  # written in another way in each kind of file
SHOWN = f"has a token of {len(TOKEN)} characters"


def wrapper(what, output_dir):
    command = [sys.executable, "-m", "ppdiffusers_train.cli", "launch", "--nproc_per_node=2"]
    return [*command, str(RANK), what, f"--output_dir={output_dir}"]


def assert_no_token(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    logs = {path.name.split(".")[0] for path in files}
    assert {"backup_env", "envlog", "default", "workerlog"} <= logs
    for file in files:
        text = file.read_text()
        assert not [form for form in (TOKEN, repr(TOKEN), json.dumps(TOKEN)) if form[1:-1] in text], file


def test_a_killed_rank_has_the_last_line_and_the_launchers_files_no_token(tmp_path):
    done = subprocess.run(
        launch_command(RANK, "killed", log_dir=tmp_path / "log"),
        env=environment(SOME_TOKEN=TOKEN), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert "Exit code" in lines[-3] and lines[-1].startswith("rank 1 was killed by SIGKILL (9)"), done.stdout
    assert f"rank 0 {SHOWN}" in lines
    assert_no_token(tmp_path)
    kept = json.loads((tmp_path / "log" / "backup_env.1.json").read_text())
    assert kept["SOME_TOKEN"] == "***" and kept["PADDLE_TRAINER_ID"] == "1"


def test_a_rank_that_ends_before_all_have_met_ends_the_others_though_its_status_is_good(tmp_path):
    done = subprocess.run(
        launch_command(RANK, "leaves", log_dir=tmp_path / "log"),
        env=environment(SOME_TOKEN=TOKEN), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    told = "rank 0: rank 1 has ended before all ranks had met"
    assert done.returncode and done.stdout.splitlines()[-1] == told, done.stdout
    assert (tmp_path / "log" / "workerlog.0").read_text().splitlines()[-1] == told


def test_the_wrapper_passes_on_the_rank_s_own_status_and_nothing_of_the_launcher(tmp_path):
    for _ in range(2):
        done = subprocess.run(
            wrapper("fails", tmp_path / "out"), env=environment(SOME_TOKEN=TOKEN), cwd=tmp_path,
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr == "launched_rank.py: error: --flag: of rank 1 is wrong\n"
        first, *rest = done.stdout.splitlines()
        assert first.startswith(f"logs of all ranks: {tmp_path / 'out' / 'log'}/")
        assert f"rank 0 {SHOWN}" in rest, done.stdout
        assert all(line.startswith(("rank ", "launched_rank.py: ")) for line in rest), done.stdout
    assert len(list((tmp_path / "out" / "log").iterdir())) == 2 and not (tmp_path / "log").exists()
    assert_no_token(tmp_path)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_wrapper_s_end_is_the_ranks_end(tmp_path, number, status):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with open(tmp_path / "said", "w") as said:
        command = subprocess.Popen(
            wrapper("waits", tmp_path), env=environment(SOME_TOKEN=TOKEN, TMPDIR=str(temporary)),
            stdout=said, stderr=said,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background shells have it ignored
        )  # fmt: skip
    try:
        wait_for(lambda: SHOWN in (tmp_path / "said").read_text())
        launcher = int(Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text())
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        os.kill(command.pid, signal.SIGUSR1)
        logs = [next(tmp_path.glob(f"log/*/workerlog.{rank}")) for rank in (0, 1)]
        wait_for(lambda: all("got SIGUSR1" in log.read_text() for log in logs))
        os.kill(command.pid, number)
        assert command.wait(30) == status
        wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in (launcher, *ranks)))
        first = "got SIGINT" if number == signal.SIGINT else "got SIGTERM"
        assert all(first in log.read_text() for log in logs) and not list(temporary.iterdir())
    finally:
        command.kill()
    assert "LAUNCH" not in (tmp_path / "said").read_text()
