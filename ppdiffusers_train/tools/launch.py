"""`ppdiffusers-train launch`: Paddle's launcher with a log folder for each run, and no token in it.

Paddle's launcher starts the ranks. In addition, secrets of the environment are passed to the ranks through memory, the
launcher's own log lines are not printed, and the exit status is that of the rank that failed.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.launcher.signals import WARNING_SIGNALS, signal_at_parents_end
from ppdiffusers_train.launcher.tokens import pass_secrets
from ppdiffusers_train.launcher.watched_ranks import (
    Received,
    address_of,
    open_mailbox,
    ranks_of,
    wait_for_final_message,
)

# Lines that the launcher and Paddle print about themselves, or about a failure, with the whole environment.
NOISE = re.compile(
    rb"LAUNCH INFO |LAUNCH ERROR .*Container failed|Container rank \d+ status |env \{|=+ Modified FLAGS detected|=+$"
    rb"|FLAGS\(name=|.*UserWarning: No ccache found|  warnings\.warn\(warning_message\)"
)


def add_launch_command(commands) -> None:
    """Add the command `launch` to `ppdiffusers-train`."""
    command = commands.add_parser(
        "launch", config=False, add_help=False, prefix_chars="+",  # flags belong to the launcher and the script
        help="start a training script on several GPUs",
        usage="ppdiffusers-train launch [FLAGS OF paddle.distributed.launch] SCRIPT ...",
        description="Start a training script with Paddle's launcher. The launcher's flags, such as --gpus 0,1 or "
        "--nproc_per_node 2, come first. Each run writes the logs of its ranks into a new folder in OUTPUT_DIR/log "
        "(--log_dir chooses another); no secret of the environment is written there. The exit status is that of the "
        "rank that failed.",
    )  # fmt: skip
    command.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="SCRIPT ...",
        help="Name the training script, then its flags.",
    )  # fmt: skip

    def run(args) -> int:
        if args.words[:1] in (["-h"], ["--help"]):
            command.print_help()
            return 0
        return launch(args.words)

    command.set_defaults(run=run)


def launch(words: list) -> int:
    """Run a script on several ranks. Returns the exit status, or 128 + n if signal n ended the rank.

    Args:
        words: the launcher's flags, the script, its flags.
    Raises:
        UserError: there is no script, or the folder for the logs cannot be made.
    """
    place = place_of_script(words)
    flags, script = words[:place], words[place:]
    environment = initial_environment()
    if not any(word.split("=")[0] == "--log_dir" for word in flags) and "PADDLE_LOG_DIR" not in environment:
        flags += ["--log_dir", str(new_log_folder(output_folder(script[1:])))]
    pass_secrets(environment)
    launcher = subprocess.Popen(
        [sys.executable, "-u", "-m", "paddle.distributed.launch", *flags, *script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # or Ctrl-C would reach it twice
        preexec_fn=partial(signal_at_parents_end, signal.SIGTERM),
    )
    received = Received(open_mailbox(address_of(launcher.pid)))
    pass_signals_on(launcher)
    with ThreadPoolExecutor(3) as threads:
        watching = threads.submit(wait_for_final_message, launcher.pid, received)
        for source, screen in ((launcher.stdout, sys.stdout), (launcher.stderr, sys.stderr)):
            threads.submit(copy_lines, source, screen.buffer, received)
        text, ends = watching.result()
    if text:
        print(text, file=sys.stderr)
    status = next((status for _, status in ends if status != 0), None)
    code = launcher.wait() if status is None else os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def place_of_script(words: list) -> int:
    """The index of the script in the command line. Each of the launcher's flags before it has one value.

    Raises:
        UserError: there is no script.
    """
    place = 0
    while place < len(words) and words[place].startswith("-"):
        place += 1 if "=" in words[place] else 2
    if place >= len(words):
        raise UserError("launch: no script; expected the launcher's flags, a training script, and its flags")
    return place


def initial_environment() -> dict:
    """The environment that this process was started with. Importing this package adds variables to it."""
    variables = os.fsdecode(Path("/proc/self/environ").read_bytes()).split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


def output_folder(flags: list) -> Path:
    """The --output_dir of a script's flags or of its --config; by default the current folder."""
    named = {}
    for name, after in zip(flags, [*flags[1:], ""]):
        name, found, value = name.partition("=")
        named[name] = value if found else after
    folder = named.get("--output_dir")
    if folder is None and "--config" in named:
        import yaml  # only here: most commands do not need it

        try:
            folder = (yaml.safe_load(Path(named["--config"]).read_text(encoding="utf-8")) or {}).get("output_dir")
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            pass  # the script reports the error
    return Path(folder or ".")


def new_log_folder(output_dir: Path) -> Path:
    """Make and print a new folder for the logs of this run's ranks.

    Raises:
        UserError: it cannot be made.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    with writing("launch: logs", output_dir, kind=UserError):
        for name in (now, *(f"{now}-{number}" for number in range(2, 100))):
            folder = output_dir / "log" / name
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue  # another node's, or another run's
            print(f"logs of all ranks: {folder}", flush=True)
            return folder
    raise UserError(f"launch: {str(output_dir / 'log')!r} has 99 folders of this second")


def pass_signals_on(launcher) -> None:
    """Pass this process's signals on: to the launcher as SIGTERM, warnings and SIGINT to the ranks."""

    def to_launcher(number, frame):
        if launcher.poll() is None:
            if number == signal.SIGINT:  # the launcher sends SIGTERM; the first signal gives the ranks' status
                to_ranks(number, frame)
            launcher.send_signal(signal.SIGTERM)

    def to_ranks(number, frame):
        for process in ranks_of(launcher.pid):
            os.kill(process, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
            signal.signal(number, to_launcher)
    for number in WARNING_SIGNALS:  # they would kill the launcher
        signal.signal(number, to_ranks)


def copy_lines(source, screen, received: Received) -> None:
    """Copy a stream line by line, without the launcher's own lines, and without the run's last message, which the
    launcher reads in the ranks' logs: it is printed at the end."""
    for line in source:
        received.read()
        is_last = received.message and line.strip() == received.message.strip().encode()
        if not NOISE.match(line) and not is_last:
            with contextlib.suppress(BrokenPipeError):  # nobody reads any more, but the launcher must not block
                screen.write(line if line.endswith(b"\n") else line + b"\n")  # a progress line has none
                screen.flush()
