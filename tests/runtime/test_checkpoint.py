import json
import os
import signal
import subprocess
import sys

import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.checkpoint import (
    checkpoints,
    find_checkpoint,
    read_state,
    replace_children,
    require_writable,
    write_checkpoint,
)

pytestmark = pytest.mark.once  # files only


def write(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_bytes(b"12345")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_found_with_what_was_written(tmp_path):
    folder = write_checkpoint(tmp_path, 3, write, {"seed": 7})
    assert names(tmp_path) == ["checkpoint-3"] and folder == tmp_path / "checkpoint-3"
    state = read_state(folder)
    assert (state["step"], state["seed"], state["files"]) == (3, 7, {"unet/weights": 5})


def test_the_limit_deletes_the_oldest_by_number(tmp_path):
    for step in (8, 9, 10, 11):
        write_checkpoint(tmp_path, step, write, {}, total_limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_the_limit_keeps_the_checkpoint_that_was_just_written_and_those_of_another_run(tmp_path):
    for step in (50, 60):
        write_checkpoint(tmp_path, step, write, {})
    for step in (8, 9):
        write_checkpoint(tmp_path, step, write, {}, total_limit=1)
    assert names(tmp_path) == ["checkpoint-50", "checkpoint-60", "checkpoint-9"]


def test_old_checkpoints_are_deleted_only_after_the_new_one_is_complete(tmp_path):
    write_checkpoint(tmp_path, 1, write, {})

    def fail(folder):
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_checkpoint(tmp_path, 2, fail, {}, total_limit=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_kill_in_the_middle_of_writing_loses_only_that_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1, write, {})
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from ppdiffusers_train.runtime.checkpoint import write_checkpoint\n"
        "def write(folder):\n    (folder / 'weights').write_bytes(b'123')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_checkpoint(Path(sys.argv[1]), 2, write, {}, total_limit=1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert find_checkpoint("latest", tmp_path)[0] == tmp_path / "checkpoint-1"
    write_checkpoint(tmp_path, 2, write, {})
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"], "the next save clears what the kill left"


def spoil(folder, how):
    if how == "no state.json":
        (folder / "state.json").unlink()
    elif how == "state.json cannot be read":
        (folder / "state.json").write_text('{"step":')
    elif how == "weights is missing":
        (folder / "unet" / "weights").unlink()
    elif how == "weights has 2 bytes instead of 5":
        (folder / "unet" / "weights").write_bytes(b"12")
    elif how == "has format 99":
        (folder / "state.json").write_text(json.dumps({**read_state(folder), "format": 99}))


@pytest.mark.parametrize(
    "how",
    [
        "no state.json",
        "state.json cannot be read",
        "weights is missing",
        "weights has 2 bytes instead of 5",
        "has format 99",
    ],
)
def test_latest_skips_a_broken_checkpoint_and_says_why(tmp_path, how):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, write, {})
    spoil(tmp_path / "checkpoint-2", how)
    said = []
    assert find_checkpoint("latest", tmp_path, log=said.append)[0] == tmp_path / "checkpoint-1"
    assert len(said) == 1 and "skipped" in said[0] and how in said[0]
    with pytest.raises(UserError, match=how):
        find_checkpoint("checkpoint-2", tmp_path)


def test_a_checkpoint_is_named_by_path_or_by_name(tmp_path):
    folder = write_checkpoint(tmp_path / "a", 1, write, {}) if (tmp_path / "a").mkdir() is None else None
    assert find_checkpoint("checkpoint-1", tmp_path / "a")[0] == folder
    assert find_checkpoint(str(folder), tmp_path / "b")[0] == folder
    with pytest.raises(UserError, match="'checkpoint-7' is neither a folder nor a checkpoint in"):
        find_checkpoint("checkpoint-7", tmp_path / "a")


def test_latest_of_nothing_starts_anew_and_says_so(tmp_path):
    said = []
    assert find_checkpoint("latest", tmp_path, log=said.append) == (None, None)
    assert "starting at step 0" in said[0]


def test_replacing_never_writes_into_a_hard_link(tmp_path):
    base = tmp_path / "base"
    base.write_text("base model")
    out = tmp_path / "out"
    (out / "unet").mkdir(parents=True)
    os.link(base, out / "unet" / "weights")
    (out / "kept").write_text("kept")

    (out / ".result" / "unet").mkdir(parents=True)
    (out / ".result" / "unet" / "weights").write_text("trained")
    replace_children(out, out / ".result")
    assert base.read_text() == "base model" and (out / "unet" / "weights").read_text() == "trained"
    assert names(out) == ["kept", "unet"] and names(out / "unet") == ["weights"]


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir: files cannot be written to '.*file/out': Not a directory"):
        require_writable(tmp_path / "file" / "out", "--output_dir")
