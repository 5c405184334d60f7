"""The prompts of validation images, and how each image is generated."""

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

from ppdiffusers_train.errors import UserError

FLAG = "--validation_prompts_file"
NUMBERS = {  # settings of a line that are numbers: (types, the smallest value)
    "seed": (int, 0),
    "width": (int, 8),
    "height": (int, 8),
    "guidance_scale": ((int, float), 0),
    "num_inference_steps": (int, 1),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its first image or None for the run's, and arguments of the pipeline."""

    text: str
    seed: int | None = None
    options: dict = field(default_factory=dict)


def wants_images(args) -> bool:
    """Whether a run generates validation images."""
    return bool(args.validation_prompts or args.validation_prompts_file)


def validation_prompts(args) -> list:
    """The `Prompt`s of `--validation_prompts`, then those of `--validation_prompts_file`.

    Raises:
        UserError: the file cannot be read, or a line is wrong.
    """
    return [*map(Prompt, args.validation_prompts or ()), *read_prompts(args.validation_prompts_file)]


def read_prompts(file) -> list:
    """The `Prompt`s of a file with one JSON object per line; none without a file."""
    if not file:
        return []
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{FLAG}: {file!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = [as_prompt(line, f"{FLAG}: {file} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{FLAG}: {file!r} has no lines; expected one JSON object per line, with a prompt")
    return found


def as_prompt(line: str, place: str) -> Prompt:
    """The `Prompt` of a line. `place` names it in messages."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    known = ("prompt", "negative_prompt", *NUMBERS)
    if not isinstance(row, dict) or not row.keys() <= set(known):
        wrong = ", ".join(row.keys() - set(known)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place} has {wrong}; expected an object with {', '.join(known)}")
    row = {name: value for name, value in row.items() if value is not None}
    for name, value in row.items():
        kind, smallest = NUMBERS.get(name, (str, None))
        fits = isinstance(value, kind) and not isinstance(value, bool)
        is_size = name in ("width", "height")
        if not fits or (smallest is not None and not smallest <= value < 2**63) or (is_size and value % 8):
            number = "multiple of 8" if is_size else "whole number" if kind is int else "number"
            expected = "a text" if kind is str else f"a {number} from {smallest} to below 2**63"
            raise UserError(f"{place}: {name} is {value!r}; expected {expected}")
    if "prompt" not in row:
        raise UserError(f"{place} has no prompt")
    return Prompt(row.pop("prompt"), row.pop("seed", None), row)


def generate(module, prompts: list, count: int, seed: int) -> list:
    """`count` images of each `Prompt`, with consecutive seeds.

    Raises:
        UserError: a prompt has settings, and the job's `generate` takes none.
    """
    seeds = [(seed if prompt.seed is None else prompt.seed) + index for prompt in prompts for index in range(count)]
    texts = [prompt.text for prompt in prompts for _ in range(count)]
    if not any(prompt.options for prompt in prompts):
        images = module.generate(texts, seeds)
    elif "options" in inspect.signature(module.generate).parameters:
        images = module.generate(texts, seeds, options=[prompt.options for prompt in prompts for _ in range(count)])
    else:
        raise UserError(f"{FLAG}: the images of this job have no settings; expected lines with prompt and seed alone")
    return [images[start : start + count] for start in range(0, len(images), count)]
