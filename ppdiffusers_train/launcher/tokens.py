"""Keeps access tokens and other secrets of the environment out of files. It runs first, so it imports no other
module."""

import contextlib
import json
import os
import re
from pathlib import Path

SECRETS_FILE = "PPDIFFUSERS_TRAIN_SECRETS"  # names the in-memory file of `pass_secrets`

_SECRET = re.compile(r"(?i)(?:token|key|secret|passw(?:or)?d|credential)s?(?=_|$)(?!.*_(?:path|file|dir)$)")


def secrets_in(environment) -> dict:
    """The variables whose names mark them as secret: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ..."""
    return {name: value for name, value in environment.items() if value and _SECRET.search(name)}


def pass_secrets(environment: dict) -> None:
    """Move the secrets of another process's environment into a file in memory.

    The file exists as long as this process. Processes of the same user with its name in their environment can read it.
    """
    found = secrets_in(environment)
    kept = os.memfd_create("secrets")
    os.write(kept, json.dumps(found).encode())
    for name in found:
        del environment[name]
    environment[SECRETS_FILE] = f"/proc/{os.getpid()}/fd/{kept}"


def receive_secrets() -> None:
    """Put the secrets of `pass_secrets` into this process's environment."""
    file = os.environ.pop(SECRETS_FILE, None)
    if file:
        os.environ.update(json.loads(Path(file).read_bytes()))


def mask_launcher_logs() -> None:
    """Mask the secrets in the files of Paddle's launcher, which writes the whole environment to three files.

    Does nothing in a process that the launcher did not start. The secrets stay in this process's environment.
    """
    backup = os.environ.get("PADDLE_BACKUP_ENV_PATH")
    if not backup:
        return
    found = secrets_in(os.environ).items()
    masks = [pair for name, value in found for pair in zip(_written(name, value), _written(name, "***"))]
    for pattern in ("backup_env.*.json", "envlog.*", "*.log"):
        for file in Path(backup).parent.glob(pattern):
            with contextlib.suppress(OSError):  # another rank has just replaced it
                _replace(file, masks)


def _written(name: str, value: str) -> tuple:
    """A variable as it is written in envlog.N, in default.POD.log, and in backup_env.N.json."""
    return f"{name}={value}\n", f"{name!r}: {value!r}", f"{json.dumps(name)}: {json.dumps(value)}"


def _replace(file: Path, masks: list) -> None:
    """Replace texts in a file atomically."""
    text = original = file.read_text(errors="surrogateescape")
    for secret, mask in masks:
        text = text.replace(secret, mask)
    if text != original:
        masked = file.with_name(f".{file.name}.{os.getpid()}")
        masked.write_text(text, errors="surrogateescape")
        masked.replace(file)
