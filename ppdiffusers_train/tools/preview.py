"""Shows the samples of a run as its model will get them, before the run: what the training script's own code makes of
the data is turned back into pictures and captions."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ppdiffusers_train.arguments import Flag, positive_int
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.encoded_cache import RunEntries
from ppdiffusers_train.data.loader import ERROR_KEY, PreprocessedSamples, as_error
from ppdiffusers_train.data.order import order_samples
from ppdiffusers_train.errors import BadSampleError, UserError, one_line, writing
from ppdiffusers_train.loop.memory_estimate import compute_on_cpu
from ppdiffusers_train.loop.run import resolve_flags
from ppdiffusers_train.models.text import read_tokens
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.runtime.checkpoint import find_checkpoint
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.runtime.run_folder import run_of_folder

GREY = (128, 128, 128)


def preview(words: list) -> tuple:
    """Write a sheet of the first samples of the run that a training command would start.

    Args:
        words: the training command: anything, the script's file, its flags.
    Returns:
        (what to print, exit status: 1 where a sample cannot be used)
    Raises:
        UserError: the command is wrong.
    """
    script, flags = split_command(words)
    job = load_script(script)
    args = parse_flags(job, script.name, flags)
    dataset = build_dataset(args)
    module = module_class(job)(args)
    order = order_samples(module, dataset, args.seed, args.train_batch_size * args.gradient_accumulation_steps, print)
    samples = PreprocessedSamples(dataset, module.preprocess, order)
    if args.encoded_cache_dir:
        samples = PreviewedEntries(dataset, module.preprocess, order, args.cache_variants)

    shown = []
    for position in tqdm(range(args.preview_samples), desc="preparing", unit="sample"):
        arrays = samples[position]  # first: a stream knows a sample's name only after reading it
        about = {"position": position, "row": order.row(position), "name": dataset.name(order.row(position))}
        shown.append({**about, **describe(module, arrays), "pictures": pictures(module, arrays)})
    scale = save_sheet(shown, args.resolution, args.preview_output)
    status = int(any(sample["error"] for sample in shown))
    if args.json:
        result = {"file": args.preview_output, "seed": args.seed, "scale": scale, "samples": shown}
        return json.dumps({**result, "status": status}, ensure_ascii=False), status
    lines = [one_line(f"{sample['position']:>4}  {sample['name']}: {', '.join(text_of(sample))}") for sample in shown]
    notes = ", as the encoded cache keeps them" if args.encoded_cache_dir else ""
    notes += ", in the order of a run on one GPU" if module.buckets else ""
    lines.append(f"wrote {args.preview_output}: {len(shown)} samples of seed {args.seed}{notes}")
    return "\n".join(lines), status


def parse_flags(job, name: str, flags: list):
    """The script's flags and the preview's own, resolved. Models are to be built without weights."""
    parser = job.build_parser()
    parser.prog = name
    group = parser.add_argument_group("preview")
    group.add_argument("--preview_output", default="preview.png", metavar="FILE", help="Picture to write.")
    group.add_argument("--preview_samples", type=positive_int, default=16, help="Number of samples to show.")
    group.add_argument("--json", action=Flag, help="Print the result as one JSON document.")
    parser.set_defaults(dry_run=True)
    args = parser.parse_args(flags)
    compute_on_cpu()
    quiet_libraries()
    resumed = args.resume_from_checkpoint
    output_dir = Path(args.output_dir)
    saved = find_checkpoint(resumed, output_dir, run_of_folder(output_dir))[1] if resumed else {}
    return resolve_flags(args, saved, start_ranks())


def save_sheet(shown: list, resolution: int, file: str) -> float:
    """Write the sheet of samples, replace the pictures in `shown` by their places on it, and return its scale.

    Raises:
        UserError: it cannot be written.
    """
    sheet = lay_out(shown, resolution)
    with writing(f"--preview_output: {os.path.basename(file)!r}", os.path.dirname(file) or ".", kind=UserError):
        sheet.image.save(file, "PNG")
    for sample, places in zip(shown, sheet.places):
        sample["pictures"] = [
            {"name": name, "left": left, "top": top, "width": picture.width, "height": picture.height}
            for (name, picture), (left, top) in zip(sample["pictures"].items(), places)
        ]
    return sheet.scale


def split_command(words: list) -> tuple:
    """(the script's path, its flags) of a training command such as `python -u train.py --resolution 512`.

    Raises:
        UserError: there is no script in it.
    """
    place = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        raise UserError("preview: no script; expected a training command such as train_text_to_image_sdxl.py --flag …")
    return Path(words[place]), words[place + 1 :]


def load_script(path: Path):
    """A training script as a module, without running it.

    Raises:
        UserError: there is none at `path`.
    """
    if not path.is_file():
        raise UserError(f"preview: there is no script {str(path)!r}")
    sys.path.insert(0, str(path.parent.absolute()))  # as for a script that is run
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "build_parser"):
        raise UserError(f"preview: {str(path)!r} has no build_parser(); expected a training script of this project")
    return module


def module_class(job):
    """The training module that a script defines; of one and its base class, that one.

    Raises:
        UserError: it defines none, or several.
    """
    found = [
        value
        for value in vars(job).values()
        if isinstance(value, type) and issubclass(value, DiffusionTrainingModule) and value.__module__ == job.__name__
    ]
    found = [kind for kind in found if not any(issubclass(other, kind) for other in found if other is not kind)]
    if len(found) != 1:
        raise UserError(f"preview: {job.__file__!r} defines {len(found)} training modules; expected one")
    return found[0]


class PreviewedEntries:
    """At index `position`: the input that the encoded cache encodes for that position of the run, `{name: array}`."""

    def __init__(self, dataset, preprocess, order, variants: int):
        self.dataset, self.preprocess = dataset, preprocess
        self.entries = RunEntries(dataset, order, variants)

    def __getitem__(self, position):
        try:
            return self.entries.at(position).preprocessed(self.dataset, self.preprocess)
        except BadSampleError as error:
            return as_error(error)


def describe(module, arrays: dict) -> dict:
    """A sample's conditioning: the texts of its tokens, how many there are, size and crop."""
    found = {"captions": [], "tokens": [], "told": "", "error": arrays.get(ERROR_KEY, "")}
    for name, array in arrays.items():
        if name.startswith("input_ids") and not name.endswith("_mask"):
            caption, tokens = read_tokens(getattr(module, name.replace("input_ids", "tokenizer")), array)
            found["captions"].append(caption)
            found["tokens"].append(tokens)
    if "time_ids" in arrays:
        height, width, top, left, rows, columns = (int(value) for value in arrays["time_ids"])
        size, crop, target = f"{width} x {height}", f"left {left}, top {top}", f"{columns} x {rows}"
        found["told"] = f"conditioning: original size {size}, crop {crop}, target size {target}"
    return found


def pictures(module, arrays: dict) -> dict:
    """The arrays [3, H, W] of a sample as PIL images, by name. Those for CLIP are normalised by the mean and deviation
    of its image processor, others are in [-1, 1]."""
    found = {}
    for name, array in arrays.items():
        if np.ndim(array) == 3 and len(array) == 3:
            processor = module.image_processor if name.startswith("clip_") else None
            mean, std = (processor.image_mean, processor.image_std) if processor else (0.5, 0.5)
            pixels = array.transpose(1, 2, 0).astype(np.float64) * std + mean
            found[name] = Image.fromarray(np.uint8(np.rint(255 * np.clip(pixels, 0, 1))))
    return found


def text_of(sample: dict) -> list:
    """The lines of text about a sample."""
    if sample["error"]:
        return [sample["error"]]
    quoted = [f'"{text}" ({tokens} tokens)' for text, tokens in zip(sample["captions"], sample["tokens"])]
    return [*dict.fromkeys(quoted or ["no caption goes into this model"]), *filter(None, [sample["told"]])]


def lay_out(shown: list, resolution: int):
    """The `Sheet` of samples. Unusable samples are grey."""
    sizes = [[picture.size for picture in sample["pictures"].values()] for sample in shown if not sample["error"]]
    grey = [Image.new("RGB", size, GREY) for size in (sizes[0] if sizes else [(resolution, resolution)])]
    tiles = []
    for sample in shown:
        title = f"{sample['position']}  {sample['name'].rsplit('/', 1)[-1]}"
        tiles.append(Tile(list(sample["pictures"].values()) or grey, [title, *text_of(sample)]))
    return contact_sheet(tiles)
