"""`ppdiffusers-train lora merge|extract|resize|inspect` and `convert-lora`: LoRA files after training."""

import contextlib
import json
import math
from pathlib import Path

from ppdiffusers_train.arguments.parser import Flag, non_negative_float, positive_int
from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.models.lora_libraries import FILES

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pdparams")  # names of files, where a folder is written

# Each command imports what it needs, so that `--help` is fast.


def add_lora_command(commands) -> None:
    """Add the commands `lora` and `convert-lora` to `ppdiffusers-train`."""
    command = commands.add_parser(
        "lora", config=False, help="merge, extract, resize or inspect LoRAs",
        description="Merge LoRAs into a pipeline, extract one from two pipelines, change a LoRA's rank, describe it.",
    )  # fmt: skip
    kinds = command.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(command))
    for add in (add_merge, add_extract, add_resize, add_inspect):
        add(kinds)
    add_convert(commands)


def add_merge(commands) -> None:
    command = commands.add_parser(
        "merge", help="write a pipeline with LoRAs in its weights",
        description="Write a whole pipeline whose weights are the base's plus those of LoRAs, in the base's dtype and "
        "layout. It generates the same images as the base with the LoRAs loaded.",
    )  # fmt: skip
    add = command.add_argument
    add("--base", required=True, metavar="DIR", help="Read the pipeline of this folder or hub repository.")
    add(
        "--lora", required=True, nargs="+", action="extend", metavar="PATH[:SCALE]",
        help="Add the LoRAs of these files or folders, each multiplied by its scale, 1 if none is given.",
    )  # fmt: skip
    add("--output", required=True, metavar="DIR", help="Write the pipeline to this folder, which must not exist.")
    add_variant(add)
    command.set_defaults(run=merge)


def add_extract(commands) -> None:
    command = commands.add_parser(
        "extract", help="write the difference of two pipelines as a LoRA",
        description="Write the LoRA of a rank that is nearest to the difference of two pipelines, found by singular "
        "value decomposition. What a LoRA cannot hold, such as biases and norms, is listed.",
    )  # fmt: skip
    add = command.add_argument
    add("--base", required=True, metavar="DIR", help="Subtract the pipeline of this folder or hub repository.")
    add("--tuned", required=True, metavar="DIR", help="Read the fine-tuned pipeline of this folder or hub repository.")
    add("--rank", required=True, type=positive_int, help="Write layers of this rank; smaller layers have their own.")
    add(
        "--lora_target_modules", metavar="NAMES",
        help="Extract layers whose names end like this, separated by commas; without it, all linear layers and "
        "convolutions.",
    )  # fmt: skip
    add_output(add)
    add_variant(add)
    command.set_defaults(run=extract)


def add_resize(commands) -> None:
    command = commands.add_parser(
        "resize", help="change a LoRA's rank",
        description="Write a LoRA with another rank. A smaller one is the nearest LoRA of that rank, found by singular "
        "value decomposition; with a larger one the LoRA computes the same.",
    )  # fmt: skip
    add = command.add_argument
    add("source", metavar="PATH", help="Read this LoRA file, or its folder.")
    add("--rank", required=True, type=positive_int, help="Write all layers with this rank.")
    add_output(add)
    command.set_defaults(run=resize)


def add_inspect(commands) -> None:
    command = commands.add_parser(
        "inspect", help="describe a LoRA's file",
        description="Print what a LoRA's file holds: the models that it fits, its layout, layers, ranks, alphas and "
        "norms, and the flags that it was trained with.",
    )  # fmt: skip
    add = command.add_argument
    add("source", metavar="PATH", help="Read this LoRA file, or its folder.")
    add("--base", metavar="DIR", help="Check that all its layers fit the pipeline of this folder or hub repository.")
    add("--json", action=Flag, help="Print JSON, also with the norm of each layer.")
    command.set_defaults(run=inspect)


def add_convert(commands) -> None:
    command = commands.add_parser(
        "convert-lora", help="rewrite a LoRA's file for another library",
        description="Rewrite a LoRA's file for another library.",
    )  # fmt: skip
    add = command.add_argument
    add("source", metavar="SOURCE", help="Read this LoRA file, or its folder, from a LoRA script or another trainer.")
    add("--to", choices=FILES, required=True, help="Write for this library; kohya is for ComfyUI and WebUIs.")
    add(
        "--output", required=True, metavar="PATH",
        help="Write to this folder, or to this file that ends in .safetensors.",
    )  # fmt: skip
    add("--scale", type=non_negative_float, default=1.0, help="Multiply the LoRA's updates by this factor.")
    command.set_defaults(run=convert)


def add_variant(add) -> None:
    add("--variant", help="Read this variant of the weight files, such as fp16.")


def add_output(add) -> None:
    add(
        "--output", required=True, metavar="PATH",
        help="Write to this folder, or to this file that ends in .safetensors; it must not exist.",
    )  # fmt: skip
    add("--to", choices=FILES, default="ppdiffusers", help="Write for this library; kohya is for ComfyUI and WebUIs.")


def merge(args) -> None:
    """Write a pipeline with LoRAs in its weights."""
    from ppdiffusers_train.models.lora_files import find_lora
    from ppdiffusers_train.models.lora_merge import WholePipeline, add_changes, write_merged
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from ppdiffusers_train.runtime.checkpoint import atomic_folder

    quiet_libraries()
    target = new_path(args.output)
    if target.suffix in WEIGHTS or Path(args.base).resolve() in target.resolve().parents:
        raise UserError(f"--output: {args.output!r} is a file's name or within --base; expected another new folder")
    base, changes = WholePipeline(args.base, "--base", args.variant), {}
    for text in args.lora:
        path, scale = path_and_scale(text)
        file = find_lora(path, "--lora")
        count, full = add_changes(changes, base, file, scale, path)
        beside = f" and {full} tensors that were trained in full" if full else ""
        print(f"{file}: {count} layers{beside}, times {scale:g}")
    with writing("--output: the pipeline", target.parent, kind=UserError), atomic_folder(target) as folder:
        write_merged(base, changes, folder)
    print(f"wrote {target}: changed {', '.join(changes)}; the rest is the base's")


def extract(args) -> None:
    """Write the difference of two pipelines as a LoRA."""
    from ppdiffusers_train.models.lora_merge import Difference, WholePipeline
    from ppdiffusers_train.reporting.quiet import quiet_libraries

    quiet_libraries()
    target = new_path(args.output)
    base = WholePipeline(args.base, "--base", args.variant)
    tuned = WholePipeline(args.tuned, "--tuned", args.variant)
    targets = args.lora_target_modules and [name.strip() for name in args.lora_target_modules.split(",")]
    difference = Difference(base, tuned, args.rank, targets)
    file = write_new(target, difference.updates, args.to)
    print(f"{file}: {len(difference.updates)} layers of rank {args.rank} or less, for {args.to}")
    print(f"lost by the rank: at most {max(difference.lost.values()):.2%} of the norm of a layer's difference")
    if left := difference.left_out:
        print(f"not held: {len(left)} tensors that differ, such as {left[0]}; the LoRA does not change them")


def resize(args) -> None:
    """Change a LoRA's rank."""
    import numpy as np

    from ppdiffusers_train.models.lora_files import find_lora, padded, read_lora
    from ppdiffusers_train.models.lora_svd import computed_later, resized

    target, source, lost, updates = new_path(args.output), find_lora(args.source, "PATH"), {}, {}
    before = read_lora(source)
    largest = max(max(update.rank, min(update.shape)) for update in before.values())
    if args.rank > largest:
        raise UserError(f"--rank: {args.rank} is more than any layer of {source} can use; expected at most {largest}")
    for layer, update in before.items():

        def compute(layer=layer, update=update):
            found, lost[layer] = resized(update, args.rank)
            return found.down, found.up

        shapes = [args.rank, *update.stored_down.shape[1:]], [update.shape[0], args.rank, *update.stored_up.shape[2:]]
        is_cut = args.rank < update.rank
        updates[layer] = computed_later(*shapes, np.dtype("float32"), compute) if is_cut else padded(update, args.rank)
    file = write_new(target, updates, args.to)
    ranks = sorted({update.rank for update in before.values()})
    print(f"{file}: {len(updates)} layers of rank {args.rank}, before {', '.join(map(str, ranks))}, for {args.to}")
    remark_on_full(args.source)
    if min(ranks) < args.rank:
        print("padded with zeros: the LoRA computes the same")
    if max(ranks) > args.rank:
        worst = max(lost.values())
        print(f"truncated by SVD: at most {worst:.2%} of the norm of a layer is lost; alpha is the rank now")


def inspect(args) -> None:
    """Describe a LoRA's file."""
    from ppdiffusers_train.models.lora_files import find_lora
    from ppdiffusers_train.tools.lora_report import describe, report

    found = report(find_lora(args.source, "PATH"), args.base)
    print(json.dumps(found, ensure_ascii=False) if args.json else describe(found))


def convert(args) -> None:
    """Rewrite a LoRA's file for another library."""
    from ppdiffusers_train.models.lora_files import find_lora, read_lora, write_lora

    source = find_lora(args.source, "SOURCE")
    target = lora_file(args.output, args.to)
    new_path(target)
    updates = {layer: update.times(args.scale) for layer, update in read_lora(source).items()}
    with writing("--output: the LoRA", target.parent, kind=UserError):
        write_lora(target, updates, args.to)
    ranks = sorted({update.rank for update in updates.values()})
    print(f"{target}: {len(updates)} layers of rank {', '.join(map(str, ranks))}, for {args.to}")
    remark_on_full(args.source)


def remark_on_full(path) -> None:
    """Say that a LoRA's folder also has parameters that were trained in full, which a LoRA's file has no place for."""
    from ppdiffusers_train.models.lora_files import find_lora
    from ppdiffusers_train.models.lora_init import find_full

    if full := find_full(find_lora(path, "PATH"), path):
        print(f"{full}: not part of the new file; `lora merge` and `load_lora` read the folder")


def path_and_scale(text: str) -> tuple:
    """`my-lora:0.5` -> ("my-lora", 0.5). A path that exists is one, whatever colons it has."""
    path, colon, end = text.rpartition(":")
    if Path(text).exists() or not colon:
        return text, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(scale := float(end)):
            return path, scale
        raise UserError(f"--lora: {text!r} has the scale {end!r}; expected a finite number")
    return text, 1.0


def new_path(output) -> Path:
    """The path of `--output`; a `UserError` if there is something already."""
    if Path(output).exists() or Path(output).is_symlink():
        raise UserError(f"--output: {str(output)!r} exists; expected a new folder or file")
    return Path(output).absolute()


def lora_file(output, library: str) -> Path:
    """The file that `--output` stands for: itself, or the library's usual name in the folder."""
    return Path(output) if Path(output).suffix == ".safetensors" else Path(output) / FILES[library]


def write_new(target: Path, updates: dict, library: str) -> Path:
    """Write a LoRA into a new file or folder, which appears when it is whole; returns the file."""
    from ppdiffusers_train.models.lora_files import write_lora
    from ppdiffusers_train.runtime.checkpoint import atomic_folder

    with writing("--output: the LoRA", target.parent, kind=UserError):
        if target.suffix == ".safetensors":
            write_lora(target, updates, library)
        else:
            with atomic_folder(target) as folder:
                write_lora(folder / FILES[library], updates, library)
    return lora_file(target, library)
