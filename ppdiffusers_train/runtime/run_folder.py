"""Which run the files in an output folder belong to.

Each run has an id, which a resumed run keeps. It is stored in `training_args.json`, in the `state.json` of checkpoints
and in `result.json`, which lists the files of the result. So checkpoints and results of several runs are never mixed.
"""

import json
import os
import secrets
import shutil
from pathlib import Path

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.checkpoint import (
    STATE_FILE,
    checkpoints,
    complete_checkpoints,
    remove_folder,
    replace_children,
    run_of,
    step_of,
)

ARGUMENTS_FILE, RESULT_FILE = "training_args.json", "result.json"
WEIGHTS = (".safetensors", ".pdparams", ".bin")  # extensions of files with weights
EARLIER_RESULT = "earlier-result"
# Not part of a result.
OTHER_FOLDERS = ("checkpoint-*", "abandoned-checkpoint-*", f"{EARLIER_RESULT}*", "encoded*", "logs", "validation")
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
    found = [path.name for path in checkpoints(folder)]
    result = read_json(folder / RESULT_FILE)
    unknown = [] if result else weights_in(folder)
    flag = f"--output_dir: {str(folder)!r} holds"
    is_earlier = read_json(folder / ARGUMENTS_FILE) is not None  # older versions listed no files
    if unknown and not is_earlier:
        raise UserError(f"{flag} weights that no {RESULT_FILE} lists, such as {unknown[0]}; expected another folder")
    has_result = result or unknown
    if not overwrites and (found or has_result):
        what = " and ".join([f"checkpoints up to {found[-1]}"] * bool(found) + ["a result"] * bool(has_result))
        raise UserError(
            f"{flag} {what} of an earlier run; expected --resume_from_checkpoint latest to continue it, "
            "--overwrite_output_dir to replace it, or another folder"
        )


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
    while found.exists():
        found, number = path.with_name(f"{path.name}-{number}"), number + 1
    return found


def require_result(folder: Path) -> None:
    """Raise a `UserError` unless a folder holds a complete result; a result of an older version is taken as it is."""
    result = read_json(folder / RESULT_FILE)
    if result is None and not (read_json(folder / ARGUMENTS_FILE) and weights_in(folder)):
        raise UserError(f"{str(folder)!r} has no result of a training script: it has no {RESULT_FILE}")
    for name, size in (result or {}).get("files", {}).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{str(folder)!r} has no complete result: {name} is missing, or does not have {size} bytes")


def set_aside_later(folder: Path, run_id: str, step: int, log) -> None:
    """Rename this run's checkpoints of steps after `step` to `abandoned-checkpoint-<step>`: the run goes back."""
    later = [path for path in complete_checkpoints(folder, run_id) if step_of(path) > step]
    for path in later:
        os.rename(path, free_name(path.with_name(f"abandoned-{path.name}")))
    if later:
        log(
            f"{later[0].name}{f' to {later[-1].name}' if later[1:] else ''}: set aside as abandoned-checkpoint-…, "
            f"because the run resumes at step {step}"
        )


def earlier_checkpoints(folder: Path, run_id: str) -> list:
    """The checkpoints of all runs but this one."""
    return [path for path in checkpoints(folder) if run_of(read_json(path / STATE_FILE) or {}) != run_id]


def remove_earlier_checkpoints(folder: Path, run_id: str) -> None:
    """Delete the checkpoints of all runs but this one."""
    for path in earlier_checkpoints(folder, run_id):
        remove_folder(path)


def replace_result(folder: Path, run_id: str, step: int, write) -> None:
    """Replace the result in a folder: files of the earlier result that are not written again are deleted.

    Args:
        write: `write(path)` fills an empty folder with the new result.
    """

    def write_with_list(inside):
        write(inside)
        found = [path for path in Path(inside).rglob("*") if path.is_file()]
        files = {str(path.relative_to(inside)): path.stat().st_size for path in found}
        text = json.dumps({"run": run_id, "step": step, "files": files}, indent=1, ensure_ascii=False)
        (Path(inside) / RESULT_FILE).write_text(text, encoding="utf-8")

    before = (read_json(folder / RESULT_FILE) or {}).get("files", {})
    written = replace_children(folder, write_with_list)
    for name in {Path(file).parts[0] for file in before} - set(written):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
