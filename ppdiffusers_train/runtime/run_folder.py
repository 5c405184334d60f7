"""Which run the files in an output folder belong to.

Each run has an id, which a resumed run keeps. It is stored in `training_args.json`, in the `state.json` of checkpoints
and in `result.json`, which lists the files of the result. So checkpoints and results of several runs are never mixed.
"""

import json
import os
import secrets
import shutil
from fnmatch import fnmatch
from pathlib import Path

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.checkpoint import (
    STATE_FILE,
    atomic_folder,
    checkpoints,
    complete_checkpoints,
    is_complete,
    link_or_copy,
    remove_folder,
    replace_children,
    run_of,
    step_of,
    write_text,
)

ARGUMENTS_FILE, RESULT_FILE = "training_args.json", "result.json"
WEIGHTS = (".safetensors", ".pdparams", ".bin")  # extensions of files with weights
EARLIER_RESULT, ABANDONED = "earlier-result", "abandoned-"
# Not part of a result.
OTHER_FOLDERS = ("checkpoint-*", "abandoned-checkpoint-*", f"{EARLIER_RESULT}*", "encoded*", "logs", "validation*")
# What each folder of a part has, with or without weights.
CONFIGURATIONS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


def new_run_id() -> str:
    """A random id for a new run."""
    return secrets.token_hex(8)


def read_json(file: Path):
    """The dictionary in a JSON file; None if there is no such file, or no dictionary in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def run_of_folder(folder: Path):
    """The id of the run that wrote to a folder last; None if that is not known."""
    arguments = read_json(folder / ARGUMENTS_FILE)
    return None if arguments is None else run_of(arguments)


def refuse_used_folder(folder: Path, overwrites: bool) -> None:
    """Raise a `UserError` if the files of a new run would be mixed with those that are already in its folder.

    Args:
        overwrites: whether the files that an earlier run wrote may be replaced.
    """
    found = checkpoints(folder)
    result = read_json(folder / RESULT_FILE)
    unknown = [] if result else weights_in(folder)
    flag = f"--output_dir: {str(folder)!r} holds"
    is_earlier = read_json(folder / ARGUMENTS_FILE) is not None  # older versions listed no files
    if unknown and not is_earlier:
        raise UserError(f"{flag} weights that no {RESULT_FILE} lists, such as {unknown[0]}; expected another folder")
    has_result = result or unknown
    if overwrites or not (found or has_result):
        return
    listed = [f"checkpoints up to {found[-1].name}"] if found else []
    listed += ["a result"] if has_result else []
    ways = ["--overwrite_output_dir to replace it", "or another folder"]
    if any(map(is_complete, found)):
        ways.insert(0, "--resume_from_checkpoint latest to continue it")
    elif found:
        listed[0] += ", none of them complete,"
    raise UserError(f"{flag} {' and '.join(listed)} of an earlier run; expected {', '.join(ways)}")


def weights_in(folder: Path) -> list:
    """Relative paths of weight files in the places of a result: at the top of the folder, or in a folder of a model."""
    ignored = {path for pattern in OTHER_FOLDERS for path in folder.glob(pattern)}
    found = []
    for path in sorted(folder.glob("*")):
        if path.is_dir() and path not in ignored and not path.name.startswith("."):
            found += [child for child in sorted(path.iterdir()) if child.suffix in WEIGHTS]
        elif path.suffix in WEIGHTS:
            found.append(path)
    return [str(path.relative_to(folder)) for path in found]


def set_aside_unlisted_result(folder: Path, log) -> None:
    """Move a result of an older version, which has no list of its files, into a folder of its own."""
    if read_json(folder / RESULT_FILE) or not (found := weights_in(folder)):
        return
    parts = [path.parent.name for name in CONFIGURATIONS for path in folder.glob(f"*/{name}")]
    names = {Path(file).parts[0] for file in found} | {*parts, "model_index.json"}
    ignored = {path.name for pattern in OTHER_FOLDERS for path in folder.glob(pattern)}
    target = free_name(folder / EARLIER_RESULT)
    target.mkdir()
    for name in sorted(names - ignored):
        if (folder / name).exists():
            os.rename(folder / name, target / name)
    log(f"{folder}: the result of an older version is set aside as {target.name}")


def free_name(path: Path) -> Path:
    """A path that does not exist: this one, or with a number after it."""
    found, number = path, 2
    while os.path.lexists(found):  # also a link to nothing
        found, number = path.with_name(f"{path.name}-{number}"), number + 1
    return found


def listed_files(folder: Path) -> dict:
    """{path relative to a folder: size in bytes} of the files of the result in it; empty without a result, or for a
    damaged list."""
    files = (read_json(folder / RESULT_FILE) or {}).get("files")
    is_list = isinstance(files, dict) and all(isinstance(size, int) for size in files.values())
    return files if is_list else {}


def require_result(folder: Path) -> None:
    """Raise a `UserError` unless a folder holds a complete result; a result of an older version is taken as it is."""
    result, files = read_json(folder / RESULT_FILE), listed_files(folder)
    if not files and not (result is None and read_json(folder / ARGUMENTS_FILE) and weights_in(folder)):
        raise UserError(f"{str(folder)!r} has no result of a training script: it has no {RESULT_FILE} with its files")
    if result and result.get("unfinished"):
        raise UserError(f"{str(folder)!r} has no complete result: its run was ended while it replaced another one")
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{str(folder)!r} has no complete result: {name} is missing, or does not have {size} bytes")


def set_aside_other_branches(folder: Path, run_id: str, checkpoint, step: int, log) -> None:
    """Rename what a run that goes back to `checkpoint` abandons to `abandoned-checkpoint-<step>`: its checkpoints of
    later steps and, if `checkpoint` is another, that of the same step.

    If `checkpoint` was abandoned itself, it becomes `checkpoint-<step>` again, so that it is the latest one.

    Args:
        checkpoint: the folder that the run resumes from, or None at step 0.
        step: the step after which it resumes.
    """
    own = complete_checkpoints(folder, run_id)
    later = [path for path in own if step_of(path) > step or (step_of(path) == step and path != checkpoint)]
    for path in later:
        os.rename(path, free_name(path.with_name(f"{ABANDONED}{path.name}")))
    if later:
        log(
            f"{later[0].name}{f' to {later[-1].name}' if later[1:] else ''}: set aside as abandoned-checkpoint-…, "
            f"because the run resumes at step {step}"
        )
    if checkpoint and checkpoint.parent == folder and checkpoint.name.startswith(ABANDONED):
        target = folder / f"checkpoint-{step}"
        with atomic_folder(target) as inside:
            shutil.copytree(checkpoint, inside, copy_function=link_or_copy, dirs_exist_ok=True)
        log(f"{checkpoint.name}: is {target.name} again")


def earlier_checkpoints(folder: Path, run_id: str) -> list:
    """The checkpoints of all runs but this one."""
    return [path for path in checkpoints(folder) if run_of(read_json(path / STATE_FILE) or {}) != run_id]


def remove_earlier_checkpoints(folder: Path, run_id: str) -> None:
    """Delete the checkpoints of all runs but this one."""
    for path in earlier_checkpoints(folder, run_id):
        remove_folder(path)


def replace_result(folder: Path, run_id: str, step: int, write) -> None:
    """Replace the result in a folder: files of the earlier result that are not written again are deleted, and no other
    files.

    After a kill, `result.json` lists the files of both results, and says so.

    Args:
        write: `write(path)` fills an empty folder with the new result.
    """

    def record(files, **more):
        text = json.dumps({"run": run_id, "step": step, **more, "files": files}, indent=1, ensure_ascii=False)
        write_text(folder / RESULT_FILE, text)

    new = folder / ".result"
    with atomic_folder(new) as inside:
        write(str(inside))
    found = [path for path in new.rglob("*") if path.is_file()]
    files = {str(path.relative_to(new)): path.stat().st_size for path in found}
    before = listed_files(folder)
    record({**before, **files}, unfinished=True)
    replace_children(folder, new, before)
    for name in sorted(before.keys() - files.keys()):
        delete_inside(folder, name)
    record(files)


def delete_inside(folder: Path, name: str) -> None:
    """Delete a file of a result, which a list names, and the folders that are empty then. What is no place of a result
    is left alone, such as `../file`, a file behind a link, or one of a checkpoint."""
    path, root = folder / name, folder.resolve()
    try:
        is_inside = path.parent.resolve() == root / Path(name).parent and path.is_file()
    except OSError:  # no name of a file
        return
    others = (*OTHER_FOLDERS, ARGUMENTS_FILE)
    if Path(name).is_absolute() or not is_inside or any(fnmatch(Path(name).parts[0], other) for other in others):
        return
    path.unlink()
    for parent in path.parents:
        if parent == folder or any(parent.iterdir()):
            break
        parent.rmdir()
