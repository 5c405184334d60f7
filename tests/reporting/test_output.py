"""What a run shows on the screen: its own lines, and nothing of the libraries'."""

import ppdiffusers_train  # noqa: F401

import fcntl
import json
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import paddle
import pytest

from ppdiffusers_train.reporting.status_line import StatusLine, print_line
from tests.conftest import KANDINSKY, short_run

FIGURES = r"loss=\d+\.\d{4} lr=1\.00e-03 \d+\.\d samples/s \d+\.\d GB"
LEFT = r"(\d+:)?\d\d:\d\d left"
OWN_LINES = [
    r".*/photos: 7 images; captions: 7 of metadata",
    r"Kandinsky 2\.2 prior: [\d,]+ trainable parameters, 7 samples; 4 steps of 2 samples, 4 per epoch; seed 0",
    r".*/encoded/\w+: 7 of 7 samples are still to be encoded",
    r"disk: [\d.]+ MB for 7 samples to encode, .* checkpoints .*, .* for the result \(in .*; [\d.]+ GB are free\)",
    r".*/encoded: the cache is complete; encoding took \d+ s",
    r"step [24]: wrote (checkpoint-[24]|validation/step-[24]\.png)",
    r"step [24]: CLIP score [\d.]+",
    r"wrote the result to .*/out",
]
LOG_LINES = [rf"encoding: 7/7 samples, {LEFT}", rf"training: \d/4 steps, {LEFT}, {FIGURES}"]
if paddle.framework.use_pir_api():  # written in C++ while a model is traced; no Python filter sees it
    LOG_LINES.append(r"W.* Paddle static graph\(PIR\) not support input out tensor for now!!!!!")
else:
    LOG_LINES.append("--to_static: no effect, it needs Paddle 3")
STATUS_LINES = [
    r"(Resolving data files|Generating train split): .*",  # of `datasets`, which reads the folder
    r"encoding: +\d+%\|.*\| \d/7 samples \[\d\d:\d\d, [\d:?]+ left\]",
    rf"training: +\d+%\|.*\| \d/4 steps \[\d\d:\d\d, [\d:?]+ left(, {FIGURES})?\]",
]


@pytest.fixture
def base(kandinsky, tmp_path):
    """The folders of the tiny Kandinsky, with settings that a newer library has written, as in published models."""
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in kandinsky]
    for file in ("movq/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
        path = folders[1] / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_newer_library": True}))
    return folders


@pytest.fixture
def command(base, photos, tmp_path):
    """A run that encodes samples, traces a model, writes a checkpoint and generates images."""
    flags = [f"--pretrained_{name}_model_name_or_path={folder}" for name, folder in zip(("prior", "decoder"), base)]
    flags += [*short_run(photos), "--max_train_steps=4", "--encoded_cache", "--checkpointing_steps=2"]
    flags += ["--validation_prompts=a cat", "--validation_steps=2", "--validation_inference_steps=2", "--to_static"]
    script = KANDINSKY / "train_text_to_image_prior.py"
    return [sys.executable, "-u", str(script), *flags, f"--output_dir={tmp_path / 'out'}"]


def not_ours(lines, patterns):
    return [line for line in lines if line and not any(re.fullmatch(pattern, line) for pattern in patterns)]


def terminal_output(run, columns=160):
    """All that `run(file)` writes to a file that is a terminal of so many columns, 0 if unknown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    with open(ours, "rb", buffering=0) as reader:
        with open(theirs, "w") as file:
            done = run(file)
        try:
            while chunk := reader.read(2**16):
                written += chunk
        except OSError:  # its last writer has closed it
            pass
    return done, written.decode()


def test_a_log_file_has_the_run_s_own_lines_and_one_per_step(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert not_ours(done.stdout.splitlines(), OWN_LINES + LOG_LINES) == []
    steps = re.findall(r"^training: (\d)/4", done.stdout, re.MULTILINE)
    assert steps == ["1", "2", "3", "4"] and "\r" not in done.stdout


@pytest.mark.once
def test_a_terminal_has_them_above_one_line_that_is_updated(command):
    command = [word for word in command if word != "--to_static"]
    process, shown = terminal_output(lambda file: subprocess.Popen(command, stdout=file, stderr=file))
    assert process.wait() == 0, shown
    lines = shown.replace("\r\n", "\n").split("\n")
    assert not_ours([line.rstrip() for text in lines for line in text.split("\r")], OWN_LINES + STATUS_LINES) == []
    ends = [text.split("\r")[-1] for text in lines]
    assert len([text for text in ends if text.startswith("training: 100%")]) == 1
    assert len([text for text in ends if text.startswith("training:")]) == 1, "one line, written again and again"


def test_long_work_has_a_hundred_lines_and_its_end(capsys):
    with StatusLine("training", "steps", total=1234, done=500, least_seconds=0) as status:
        for _ in range(734):
            status.advance(figures="loss=1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 501/1234 steps, ") and lines[-1].startswith(
        "training: 1234/1234 steps, 00:00"
    )
    assert 55 <= len(lines) <= 65 and all(line.endswith(" left, loss=1") for line in lines)


def test_other_ranks_show_nothing(capsys):
    with StatusLine("training", "steps", total=2, visible=False) as status:
        status.advance()
    assert capsys.readouterr().err == ""


def test_time_that_is_no_work_does_not_count(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    status = StatusLine("training", "steps", total=4)
    now[0] = 10.0
    with status.paused():
        now[0] = 1000.0
    now[0] = 1010.0
    assert status.seconds == 20.0
    status.advance()
    assert capsys.readouterr().err == "training: 1/4 steps, 01:00 left\n"


def test_short_work_has_its_last_line_only(capsys):
    with StatusLine("encoding", "samples", total=4) as status:
        for _ in range(4):
            status.advance()
    assert capsys.readouterr().err == "encoding: 4/4 samples, 00:00 left\n"


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_of_unknown_width_gets_lines(columns, monkeypatch):
    def run(file):
        monkeypatch.setattr(sys, "stderr", file)
        with StatusLine("encoding", "samples", total=2) as status:
            status.advance(2)

    _, shown = terminal_output(run, columns)
    assert shown.strip().split("\r")[-1].startswith("encoding: 2/2 samples, " if columns == 0 else "encoding: 100%|"), (
        shown
    )


def test_a_message_stands_above_the_status_line(capsys):
    with StatusLine("training", "steps", total=2) as status:
        status.advance()
        print_line("skipped step 1")
    assert capsys.readouterr().out == "skipped step 1\n"


@pytest.mark.once
@pytest.mark.parametrize("mistake, status", [("", 0), ("raise UserError('a mistake')", 2)])
def test_a_full_disk_of_the_log_file_costs_lines_and_no_run(tmp_path, mistake, status):
    code = f"""if True:
        import sys
        from ppdiffusers_train.errors import UserError, one_line_errors
        from ppdiffusers_train.reporting.status_line import StatusLine, print_line

        @one_line_errors
        def main(argv=None):
            for line in range(2000):
                print_line(f"line {{line}} of a long log")
            with StatusLine("training", "steps", 3) as status:
                status.advance(3)
            {mistake}
            open(sys.argv[1], "w").close()

        main()
    """
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "done")], stdout=full, stderr=full)
    assert done.returncode == status and (tmp_path / "done").exists() == (status == 0)


@pytest.mark.once
def test_a_line_stays_a_line_whatever_the_names_in_it(capsys):
    print_line("used: a\nb\r\x1b[2J\u202egnp.exe\u2028\ud800 猫 👍🏽.png")
    assert capsys.readouterr().out == "used: a\\nb\\r\\x1b[2J\\u202egnp.exe\\u2028\\ud800 猫 👍🏽.png\n"
