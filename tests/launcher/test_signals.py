"""What signals do to a run, and to a rank that Paddle's launcher has started. Real processes, without Paddle."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from ppdiffusers_train.launcher.signals import REPETITION_SECONDS, ExitOnSignal, SignalClassifier, StopRequest
from ppdiffusers_train.runtime.processes import is_alive
from tests.conftest import ROOT

pytestmark = pytest.mark.once  # Paddle has no part in it


@pytest.fixture
def heard_outside():
    """What reaches handlers that were there before."""
    heard, before = [], {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before[number] = signal.signal(number, lambda number, frame: heard.append(number))
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def test_signals_within_two_seconds_are_one_and_a_later_one_is_for_whoever_was_there_before(heard_outside):
    with StopRequest() as stop:
        assert stop.received is None
        send(signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
        time.sleep(REPETITION_SECONDS - 1)
        send(signal.SIGTERM)
        assert stop.received == signal.SIGINT and not heard_outside
        time.sleep(1.1)
        send(signal.SIGTERM)
        assert heard_outside == [signal.SIGTERM] and stop.received == signal.SIGINT
    send(signal.SIGINT)
    assert heard_outside == [signal.SIGTERM, signal.SIGINT]


def test_a_warning_stops_where_it_is_asked_for_and_what_it_announces_is_no_second_stop(heard_outside):
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        assert stop.received is None and heard_outside == [signal.SIGUSR1]
    with StopRequest("USR1") as stop:
        send(signal.SIGUSR1)
        assert stop.received == signal.SIGUSR1
        time.sleep(REPETITION_SECONDS + 0.1)
        send(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    assert heard_outside == [signal.SIGUSR1] and stop.received == signal.SIGUSR1


def test_a_worker_that_a_run_forks_ends_when_it_is_asked_to(heard_outside):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with ExitOnSignal(), StopRequest():
        worker = os.fork()
        if not worker:
            time.sleep(10)
            os._exit(0)
        time.sleep(0.1)
        os.kill(worker, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM


ENDS_ITS_STEP = """
import sys, time
from ppdiffusers_train.launcher.signals import ExitOnSignal, StopRequest, signal_name
with ExitOnSignal(), StopRequest() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    for _ in range(3):
        print("to a terminal that is gone", flush=True)
        print("here, too", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(signal_name(stop.received))
    sys.exit(128 + stop.received)
"""


def test_a_terminal_that_is_closed_stops_a_run_as_sigterm_does(tmp_path):
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under `nohup`
        os.execv(sys.executable, [sys.executable, "-c", ENDS_ITS_STEP, str(tmp_path / "said")])
    while b"ready" not in os.read(terminal, 1000):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert (tmp_path / "said").read_text() == "SIGHUP"


def test_a_run_that_shall_outlive_its_terminal_does(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does

    command = [sys.executable, "-c", ENDS_ITS_STEP, str(tmp_path / "said")]
    with subprocess.Popen(command, preexec_fn=ignore, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        run.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        run.communicate()
    assert (tmp_path / "said").read_text() == "SIGTERM"


def test_the_launcher_takes_longer_to_tell_more_ranks(monkeypatch):
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "8")
    eight = SignalClassifier().seconds
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "1")
    assert SignalClassifier().seconds == REPETITION_SECONDS
    assert 7 * 0.6 + 0.4 < eight < 8 * 0.6 + 3, "its repetitions to the eighth are one; what follows 3 s later is not"


# What begins every program below: a run that says where it is, and is controlled by files.
RUN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import ppdiffusers_train, os, signal, subprocess, time
from pathlib import Path
from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.launcher.signals import StopRequest
folder = Path(sys.argv[1])
def write(name, text=""):
    (folder / f".{{name}}").write_text(str(text))
    (folder / f".{{name}}").rename(folder / name)
def ready():
    write("run", os.getpid())
"""
SAVES = """
from ppdiffusers_train.launcher.supervisor import request_time_to_finish
request_time_to_finish()
with StopRequest("USR1") as stop:
    ready()
    while not stop.received: time.sleep(0.02)
    write("asked", stop.received.name)
    while not (folder / "may_end").exists(): time.sleep(0.02)
    write("saved")
raise SystemExit(128 + stop.received)
"""
# In which the launcher's signals to three ranks are one.
WINDOW = REPETITION_SECONDS + 2 * 0.6

# Says how the rank that it has started has ended; Paddle's launcher is known by its name on the command line.
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, *sys.argv[2:]], start_new_session=True)
open(sys.argv[-1] + "/rank", "w").write(str(rank.pid))
print("status", rank.wait())
"""


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Rank:
    """A run that a launcher has started: numbers of the launcher, of its child, and of the run."""

    def __init__(self, folder, program):
        (folder / "program.py").write_text(RUN + program)
        command = [sys.executable, "-c", LAUNCHER, "paddle.distributed.launch", folder / "program.py", folder]
        self.folder = folder
        environment = {**os.environ, "PADDLE_LOCAL_SIZE": "3", "PADDLE_LOCAL_RANK": "1"}
        self.launcher = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def number(self, name):
        wait_for((self.folder / name).exists)
        wait_for((self.folder / name).read_text)
        return int((self.folder / name).read_text())

    def end(self):
        return self.launcher.communicate(timeout=30)[0].splitlines()


@pytest.fixture
def started(tmp_path):
    ranks = []

    def start(program):
        ranks.append(Rank(tmp_path, program))
        return ranks[-1]

    yield start
    for rank in ranks:
        for process in [
            rank.launcher.pid,
            *(rank.number(name) for name in ("rank", "run") if (tmp_path / name).exists()),
        ]:
            if is_alive(process):
                os.kill(process, signal.SIGKILL)
        rank.launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_the_loop_a_signal_ends_a_program_with_a_line_and_its_status(tmp_path, number):
    program = RUN + "\n@one_line_errors\ndef main(argv=None):\n    ready()\n    time.sleep(60)\nmain()"
    done = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # in the background, shells have SIGINT ignored
    )  # fmt: skip
    wait_for((tmp_path / "run").exists)
    for _ in range(3):
        done.send_signal(number)
        time.sleep(0.1)
    assert done.communicate(timeout=20)[1] == f"-c: ended by {number.name}\n" and done.returncode == 128 + number


def test_handlers_that_somebody_has_set_are_left_alone(heard_outside):
    from ppdiffusers_train.errors import one_line_errors

    one_line_errors(lambda argv: send(signal.SIGTERM, signal.SIGUSR1))()
    assert heard_outside == [signal.SIGTERM, signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL, "and others are put back"


@pytest.mark.parametrize("ending, status", [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_the_launcher_sees_the_status_of_the_run(started, ending, status):
    rank = started(f"print('at work', flush=True); ready(); {ending}")
    assert rank.end() == ["at work", f"status {status}"]
    assert rank.number("rank") != rank.number("run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_a_run_that_does_not_handle_it_yet_leaves_no_traceback(started, number):
    """As while it imports Paddle, of which an exception makes an error of its own."""
    rank = started("ready(); time.sleep(60)")
    os.kill(rank.number("run"), number)
    assert rank.end() == [f"ended by {number.name}", f"status {128 + number}"]


def test_a_signal_that_comes_before_anybody_handles_it_is_told_by_the_launchers_child(started):
    rank = started("ready(); time.sleep(60)")
    rank.number("run")
    start = time.monotonic()
    os.kill(rank.number("rank"), signal.SIGTERM)
    assert rank.end() == ["ended by SIGTERM", "status 143"]
    assert time.monotonic() - start > 0.6, "the launcher has signalled the third rank, too, by then"


def test_a_run_that_hears_nothing_and_has_nothing_to_finish_is_ended(started):
    """As a rank that waits in Paddle for others that have ended."""
    rank = started("signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(60)")
    run = rank.number("run")
    os.kill(rank.number("rank"), signal.SIGTERM)
    assert rank.end() == ["ended by SIGTERM", "status 143"] and not is_alive(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(
    "ending, said",
    [
        ("return", ["status 0"]),
        ("raise SystemExit(128 + signal.SIGTERM)", ["status 143"]),
        ("raise UserError('why')", ["program.py: error: why", "status 2", "", "program.py: error: why"]),
    ],
)
def test_a_run_that_is_ending_keeps_its_status_and_its_final_message_whatever_comes(started, number, ending, said):
    """As a rank that is signalled when another one was before."""
    program = "import atexit\nfrom ppdiffusers_train.errors import UserError\n"
    program += "from ppdiffusers_train.launcher.supervisor import request_time_to_finish\n"
    program += "atexit.register(lambda: (ready(), time.sleep(1)))\n@one_line_errors\ndef main(argv=None):\n"
    rank = started(f"{program}    request_time_to_finish()\n    with StopRequest('USR1'): {ending}\nmain()")
    rank.number("run")
    os.kill(rank.number("rank"), number)
    assert rank.end() == said


def test_a_run_that_nobody_has_asked_to_stop_ends_with_what_the_launcher_kills(started):
    rank = started("ready(); time.sleep(60)")
    run = rank.number("run")
    os.kill(rank.number("rank"), signal.SIGKILL)
    wait_for(lambda: not is_alive(run), 5)


@pytest.mark.parametrize("asking", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_was_asked_to_stop_saves_though_the_launcher_kills(started, tmp_path, asking):
    """As the launcher does it: SIGTERM three times, and 30 s later (here: 4) once more, and SIGKILL."""
    rank = started(SAVES)
    run, child = rank.number("run"), rank.number("rank")
    os.kill(child, asking)
    wait_for((tmp_path / "asked").exists)
    for pause in (0.2, 0.2, WINDOW + 0.4, 0.2, 0.2, 0.2):
        os.killpg(child, signal.SIGTERM)
        time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    time.sleep(REPETITION_SECONDS + 0.5)
    assert is_alive(run) and (tmp_path / "asked").read_text() == asking.name
    (tmp_path / "may_end").touch()
    wait_for((tmp_path / "saved").exists)
    assert rank.end() == ["status -9"]
    wait_for(lambda: not is_alive(run))


def test_a_second_signal_to_the_launchers_child_ends_a_run_that_does_not_end(started):
    rank = started(SAVES)
    run, child = rank.number("run"), rank.number("rank")
    os.kill(child, signal.SIGTERM)
    time.sleep(WINDOW + 0.2)
    os.kill(child, signal.SIGTERM)
    assert rank.end() == ["SIGTERM again: ended at once", "status 143"] and not is_alive(run)


def test_a_run_stops_when_its_launcher_is_killed(started, tmp_path):
    rank = started(SAVES)
    run, child = rank.number("run"), rank.number("rank")
    rank.launcher.kill()
    wait_for((tmp_path / "asked").exists)
    assert (tmp_path / "asked").read_text() == "SIGHUP"
    (tmp_path / "may_end").touch()
    wait_for(lambda: not is_alive(run) and not is_alive(child))
    assert (tmp_path / "saved").exists()


def test_what_a_run_starts_has_no_supervisor(started, tmp_path):
    rank = started(
        "code = 'import ppdiffusers_train, os; print(os.getppid())'\n"
        "print(subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': sys.path[0]},"
        " capture_output=True, text=True).stdout.strip() == str(os.getpid()))"
    )
    assert rank.end() == ["True", "status 0"]
