"""What is loaded before a command or a script can answer: time that a user waits for."""

from ppdiffusers_train import cli

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.once  # what is imported is the same

OWN = "ppdiffusers_train"
COMMANDS = next(action for action in cli.build_parser()._actions if action.choices).choices
ANSWER = """
import sys
before = set(sys.modules)
{run}
print(*({{name.split(".")[0] for name in set(sys.modules) - before}}), file=sys.stderr)
"""
COMMAND = """
from ppdiffusers_train.cli import main
try:
    main({words})
except SystemExit as end:
    assert end.code == {status}, end.code
"""
SCRIPTS = """
import contextlib, io, pathlib, runpy, sys
import ppdiffusers_train, ppdiffusers
before = set(sys.modules)
for script in sorted(pathlib.Path({root!r}, "examples").glob("*/train_*.py")):
    for flag, status in (("--help", 0), ("--resolutoin=64", 2)):
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                sys.path.insert(0, str(script.parent))
                runpy.run_path(str(script))["main"]([flag])
        except SystemExit as end:
            assert end.code == status, end.code
"""


def packages_loaded_by(run):
    """The packages that Python code loads in a process of its own, without those of Python itself."""
    done = subprocess.run([sys.executable, "-c", ANSWER.format(run=run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()) - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("words", "status"),
    [([], 2), (["--help"], 0), (["--hlep"], 2), *(([command, "--help"], 0) for command in COMMANDS)],
    ids=str,
)
def test_the_command_line_answers_without_loading_any_package(words, status):
    assert packages_loaded_by(COMMAND.format(words=words, status=status)) == {OWN}


def test_a_script_says_its_flags_before_it_loads_more_than_ppdiffusers_itself_and_the_types_of_files():
    loaded = packages_loaded_by(SCRIPTS.format(root=str(ROOT)))
    loaded = {name for name in loaded if not name.startswith("train_")}  # scripts that others extend
    assert loaded <= {OWN, "ppdiffusers", "PIL", "ml_dtypes", "tokenizers"}  # the last takes 0.05 s
