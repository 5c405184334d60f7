"""Checkpoints and results, which are written atomically.

A checkpoint is written into a temporary folder, synced to disk, and renamed. Its `state.json`, written last, lists
every file with its size, so a folder that is incomplete for another reason is recognised, too.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from ppdiffusers_train.errors import UserError, writing

STATE_FILE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


@contextlib.contextmanager
def atomic_folder(target: Path):
    """Yield an empty folder that replaces `target` atomically at the end; after an error, `target` is unchanged."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
    except BaseException:  # also a signal
        shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
        raise
    replaced = target.with_name(f".{target.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def replace_children(folder: Path, new: Path, listed=()) -> None:
    """Move the files and folders in `new` into `folder`, where they replace those of the same name; `new` is removed.

    Existing files are never opened for writing: they may be hard links to a base model.

    Args:
        listed: files that may go, with paths relative to `folder`. Others in a folder that is replaced are kept;
            without a list, none are.
    """
    for child in sorted(new.iterdir()):
        old, replaced = folder / child.name, folder / f".{child.name}.old"
        if listed and child.is_dir() and old.is_dir() and not old.is_symlink():
            keep_others(folder, new, child.name, listed)
        if os.path.lexists(old):
            os.rename(old, replaced)
        os.rename(child, old)
        if replaced.is_dir() and not replaced.is_symlink():
            shutil.rmtree(replaced)
        else:
            replaced.unlink(missing_ok=True)
    new.rmdir()


def keep_others(folder: Path, new: Path, name: str, listed) -> None:
    """Link the files below `folder/name` that are neither `listed` nor in `new` into `new/name`."""
    for path in (folder / name).rglob("*"):
        inside = path.relative_to(folder)
        if (path.is_symlink() or not path.is_dir()) and str(inside) not in listed and not os.path.lexists(new / inside):
            (new / inside).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, new / inside)


def link_or_copy(file, copy) -> None:
    """Make `copy` a hard link to a file, or a copy where the disk cannot link. A symbolic link stays one."""
    try:
        os.link(file, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, copy, follow_symlinks=False)


def write_text(file: Path, text: str) -> None:
    """Write a text to disk atomically. Names of files in it, which need not be valid UTF-8, are escaped."""
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # left after an error such as a full disk
    sync(file.parent)


def require_writable(folder: Path, flag: str) -> None:
    """Create `folder`; raise a `UserError` that names `flag` if nothing can be written there."""
    with writing(f"{flag}: files", folder, kind=UserError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def sync(path) -> None:
    """Make the system write a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything in a folder."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_checkpoint(output_dir: Path, step: int, write, state: dict, total_limit=None) -> Path:
    """Write `output_dir/checkpoint-<step>`, then delete the oldest complete ones of this run beyond `total_limit`.

    Args:
        write: `write(folder)` writes the files of tensors into a folder.
        state: the rest of the checkpoint, as JSON, with the id of the run in `run`.
    """
    target = output_dir / f"checkpoint-{step}"
    with atomic_folder(target) as folder:
        write(folder)
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        text = json.dumps({"format": FORMAT, "step": step, **state, "files": files}, indent=1, ensure_ascii=False)
        (folder / STATE_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may not be UTF-8
    if total_limit is not None:
        own = complete_checkpoints(output_dir, run_of(state))
        for old in own[: own.index(target) + 1][:-total_limit]:
            remove_folder(old)
    return target


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that after a kill no part of it looks like a checkpoint. Of a link
    to a folder elsewhere, only the link is deleted."""
    if folder.is_symlink():
        folder.unlink()
        return
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def run_of(record: dict) -> str:
    """The id of the run in a `state.json` or `training_args.json`; empty for runs of older versions, which had none."""
    return record.get("run", "")


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(_NAME.fullmatch(checkpoint.name).group(1))


def checkpoints(output_dir: Path) -> list:
    """The folders `checkpoint-<step>` of `output_dir`, oldest first, complete or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def complete_checkpoints(output_dir: Path, run_id: str) -> list:
    """The complete checkpoints of one run in `output_dir`, oldest first."""
    found = filter(is_complete, checkpoints(output_dir))
    return [path for path in found if run_of(read_state(path)) == run_id]


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a complete checkpoint."""
    with contextlib.suppress(UserError):
        return bool(read_state(checkpoint))
    return False


def read_state(checkpoint: Path) -> dict:
    """A complete checkpoint's `state.json`.

    Raises:
        UserError: the folder is not a complete checkpoint; the message says what is missing.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        files = state["files"].items()
    except FileNotFoundError:
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {STATE_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: its {STATE_FILE} cannot be read") from error
    for name, size in files:
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint} is not a complete checkpoint: {name} is missing")
        if path.stat().st_size != size:
            raise UserError(
                f"{checkpoint} is not a complete checkpoint: {name} has {path.stat().st_size} bytes instead of {size}"
            )
    if state.get("format") != FORMAT:
        raise UserError(f"{checkpoint} has format {state.get('format')}; this version reads format {FORMAT}")
    return state


def find_checkpoint(resume: str, output_dir: Path, run_id=None, log=print):
    """The checkpoint of `--resume_from_checkpoint`: (folder, state), or (None, None) for `latest` without a checkpoint.

    Args:
        run_id: `latest` is the newest checkpoint of this run; None if that is not known.
    Raises:
        UserError: the named folder does not exist or is not complete.
    """
    if resume != "latest":
        folder = next((path for path in (Path(resume), output_dir / resume) if path.is_dir()), None)
        if folder is None:
            raise UserError(
                f"--resume_from_checkpoint: {resume!r} is neither a folder nor a checkpoint in {str(output_dir)!r}"
            )
        try:
            return folder, read_state(folder)
        except UserError as error:
            raise UserError(f"--resume_from_checkpoint: {error}") from error
    for folder in reversed(checkpoints(output_dir)):
        try:
            state = read_state(folder)
        except UserError as error:
            log(f"--resume_from_checkpoint latest: skipped, {error}")
            continue
        if run_id in (None, run_of(state)):
            return folder, state
        log(f"--resume_from_checkpoint latest: skipped, {folder} is of another run than the last one in this folder")
    log(f"--resume_from_checkpoint latest: no checkpoint in {str(output_dir)!r}, starting at step 0")
    return None, None
