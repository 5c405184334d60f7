"""Access tokens and other secrets of the environment, kept out of files. Imports nothing: it comes before all else."""

import contextlib
import json
import os
import re
from pathlib import Path

HANDED_OVER = "PPDIFFUSERS_TRAIN_SECRETS"  # names a file in memory with what `hand_over` keeps out of the environment

_SECRET = re.compile(r"(?i)(?:token|key|secret|passw(?:or)?d|credential)s?(?=_|$)(?!.*_(?:path|file|dir)$)")


def secrets_in(environment) -> dict:
    """The variables whose names say that they are secret: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ..."""
    return {name: value for name, value in environment.items() if value and _SECRET.search(name)}


def hand_over(environment: dict) -> None:
    """Move the secrets of an environment that a process is to be given into a file that exists in memory alone.

    This process keeps it; those that find its name in their environment and belong to the same user can read it.
    """
    found = secrets_in(environment)
    kept = os.memfd_create("secrets")
    os.write(kept, json.dumps(found).encode())
    for name in found:
        del environment[name]
    environment[HANDED_OVER] = f"/proc/{os.getpid()}/fd/{kept}"


def take_over() -> None:
    """Put what `hand_over` has kept into this process's environment."""
    file = os.environ.pop(HANDED_OVER, None)
    if file:
        os.environ.update(json.loads(Path(file).read_bytes()))


def scrub_launcher_logs() -> None:
    """Mask the secrets in what Paddle's launcher has written of the environment: it writes all of it, three times.

    Does nothing in a process that it did not start. The process goes on using them from its environment.
    """
    backup = os.environ.get("PADDLE_BACKUP_ENV_PATH")
    if not backup:
        return
    found = secrets_in(os.environ).items()
    masks = [pair for name, value in found for pair in zip(_written(name, value), _written(name, "***"))]
    for pattern in ("backup_env.*.json", "envlog.*", "*.log"):
        for file in Path(backup).parent.glob(pattern):
            with contextlib.suppress(OSError):  # another rank has just put its own in place
                _replace(file, masks)


def _written(name: str, value: str) -> tuple:
    """A variable as it stands in envlog.N, in default.POD.log, and in backup_env.N.json."""
    return f"{name}={value}\n", f"{name!r}: {value!r}", f"{json.dumps(name)}: {json.dumps(value)}"


def _replace(file: Path, masks: list) -> None:
    """Replace texts in a file, at once for whoever reads it."""
    text = original = file.read_text(errors="surrogateescape")
    for secret, mask in masks:
        text = text.replace(secret, mask)
    if text != original:
        masked = file.with_name(f".{file.name}.{os.getpid()}")
        masked.write_text(text, errors="surrogateescape")
        masked.replace(file)
