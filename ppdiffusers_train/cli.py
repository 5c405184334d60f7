"""ppdiffusers-train: commands around training: check, pack and preview data, launch runs, convert LoRAs, try a demo.

ppdiffusers-train examples my-training
ppdiffusers-train check my-photos
ppdiffusers-train preview train_text_to_image_sdxl.py --pretrained_model_name_or_path sdxl --train_data_dir my-photos
ppdiffusers-train pack my-photos shards --shard_size 500MB
ppdiffusers-train launch --gpus 0,1 train_text_to_image_sdxl.py --train_data_dir my-photos --output_dir my-sdxl
ppdiffusers-train convert-lora my-lora --to diffusers --output my-lora-for-torch
ppdiffusers-train toy-data shapes --count 1000 --size 32
ppdiffusers-train demo --job lcm-lora
"""

import ppdiffusers_train  # (before paddle)

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from ppdiffusers_train.arguments.parser import (
    ArgumentParser,
    CommandParser,
    Flag,
    byte_size,
    non_negative_float,
    positive_int,
    seed,
)
from ppdiffusers_train.errors import UserError, one_line_errors
from ppdiffusers_train.models.lora_libraries import FILES
from ppdiffusers_train.tools.examples import add_examples_command
from ppdiffusers_train.tools.launch import add_launch_command
from ppdiffusers_train.toy.demo.jobs import JOBS
from ppdiffusers_train.toy.world.looks import LOOKS, SIZES

MIXED = "mixed"  # all looks in turn

# Each command imports what it needs, so that `--help` is fast, and so are the processes that a command starts, which
# import this file as well.


def check_data(args) -> int:
    """Report the problems of a data set. The status is 1 where training would stop or lose samples."""
    from ppdiffusers_train.data.dataset import index_folder
    from ppdiffusers_train.data.inspection import processors
    from ppdiffusers_train.models.text import count_tokens, load_tokenizer
    from ppdiffusers_train.tools.check import Tokens, check, describe_shards
    from ppdiffusers_train.tools.sources import LIST

    with stdout_for_result(args.json):
        tokenizer = load_tokenizer(args.tokenizer, "--tokenizer") if args.tokenizer else None
        tokens = Tokens()
        if tokenizer:
            tokens = Tokens(lambda caption: count_tokens(tokenizer, caption), tokenizer.model_max_length, note="")
        source = open_named(args)
        if source.kind == LIST:
            raise UserError(
                f"{args.source!r} is a list of files, which training cannot read; `pack` makes shards of it"
            )
        options = {"kept": None} if args.json else {}
        processes = args.processes or processors()
        report = check(source, args.source, args.resolution, tokens, processes, index_folder(args), **options)
        if source.shards:
            report.notes.append(describe_shards(len(source.shards), args.ranks, args.workers))
    print(printable(json.dumps(report.as_json(), ensure_ascii=False) if args.json else report.as_text()))
    return report.status


def pack_data(args) -> int:
    """Write a data set into tar shards. The status is 1 where samples had to be left out."""
    from tqdm import tqdm

    from ppdiffusers_train.data.inspection import processors
    from ppdiffusers_train.tools.pack import PLAN_FILE, pack, summary

    started, read, written = time.monotonic(), Path(args.source).resolve(), Path(args.output_dir).resolve()
    if read.is_dir() and read in (written, *written.parents):
        raise UserError(f"OUTPUT_DIR: {args.output_dir!r} is in the folder that is read; expected another folder")
    with stdout_for_result(args.json):
        processes = args.processes or processors()
        source = open_named(args)
        plan = pack(
            source, written, args.shard_size, args.name, args.caption_column, processes,
            log=lambda text: tqdm.write(printable(text)),
        )  # fmt: skip
    result = {**summary(plan), "seconds": round(time.monotonic() - started, 3)}
    if args.json:
        print(printable(json.dumps(result, ensure_ascii=False)))
    else:
        print(
            f"{args.output_dir}: {result['samples']:,} samples in {len(result['shards'])} shards, "
            f"{result['bytes'] / 1e6:,.1f} MB; {len(result['left_out'])} left out (see {PLAN_FILE}); "
            f"{result['seconds']:.1f} s"
        )
    return int(bool(result["left_out"]))


def preview_training(args) -> int:
    """Show the samples that a training script would train on. The status is 1 where one cannot be used."""
    from ppdiffusers_train.tools.preview import preview

    with contextlib.redirect_stdout(sys.stderr):
        text, status = preview(args.command)
    print(printable(text))
    return status


def convert_lora(args) -> None:
    """Rewrite a LoRA's file for another library."""
    from ppdiffusers_train.models.lora_files import read_lora, scaled, write_lora

    source = Path(args.source)
    if source.is_dir():
        found = [source / name for name in FILES.values() if (source / name).is_file()]
        if not found:
            raise UserError(f"{args.source!r} has none of {', '.join(FILES.values())}; name the file itself")
        source = found[0]
    target = Path(args.output)
    if target.suffix != ".safetensors":
        target = target / FILES[args.to]
    if target.exists() and target.samefile(source):
        raise UserError(f"--output: {str(target)!r} is the file that is read; expected another one")
    updates = {layer: replace(update, up=scaled(update.up, args.scale)) for layer, update in read_lora(source).items()}
    write_lora(target, updates, args.to)
    ranks = sorted({update.rank for update in updates.values()})
    print(f"{target}: {len(updates)} layers of rank {', '.join(map(str, ranks))}, for {args.to}")


def toy_data(args) -> None:
    """Write training data of the world of shapes, as a folder or as shards."""
    from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset
    from ppdiffusers_train.toy.world.shapes_folder import write_shapes_folder

    looks = LOOKS if args.look == MIXED else (args.look,)
    shapes = ShapesDataset(args.seed, args.count, args.size, looks, args.held_out)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "shapes") if args.shard_size else args.output
        write_shapes_folder(folder, shapes)
        if args.shard_size:
            from ppdiffusers_train.tools.pack import pack
            from ppdiffusers_train.tools.sources import open_source

            pack(
                open_source(str(folder)),
                args.output,
                args.shard_size,
                "shapes",
                "text",
                processes=1,
                log=print,
            )
    print(f"{args.output}: {args.count} pictures of {args.size} x {args.size} pixels, with captions")


def demo(args) -> None:
    """Train a tiny model and show the result."""
    from ppdiffusers_train.toy.demo.demo import run_demo

    steps = ["--max_train_steps", str(args.max_train_steps)] if args.max_train_steps else []
    run_demo(args.job, args.output_dir, *steps, pictures=args.pictures)


def stdout_for_result(json_wanted: bool):
    """A context in which all output goes to standard error if standard output is to hold only JSON."""
    return contextlib.redirect_stdout(sys.stderr) if json_wanted else contextlib.nullcontext()


def printable(text: str) -> str:
    """A text with characters that standard output can encode: file names may be in any encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def open_named(args):
    """The `Source` that the flags of `add_source_arguments` name."""
    from ppdiffusers_train.tools.sources import open_source

    places = {name: getattr(args, name) for name in ("dataset_config_name", "cache_dir", "index_dir")}
    return open_source(args.source, args.image_column, args.caption_column, **places)


def add_source_arguments(command, what: str) -> None:
    add = command.add_argument
    add("source", metavar="SOURCE", help=what)
    add("--dataset_config_name", help="Configuration of the dataset, if it has several.")
    add("--image_column", default="image", help="Column of the images.")
    add("--caption_column", default="text", help="Column, or field of .json files, of the captions.")
    add("--cache_dir", metavar="DIR", help="Folder for downloads; by default that of Hugging Face.")
    add("--index_dir", metavar="DIR", help="Folder for indices of data sets; by default, it is in --cache_dir.")
    add(
        "--processes",
        type=positive_int,
        help="Number of processes that decode images; by default one per CPU core.",
    )
    add("--json", action=Flag, help="Print the result as one JSON document.")


def build_parser():
    parser = ArgumentParser(config=False, prog="ppdiffusers-train", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"%(prog)s {ppdiffusers_train.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)

    add_examples_command(commands)

    command = commands.add_parser(
        "check", help="report the problems of a data set, and what training would do about them",
        description="Decode every image, check every caption, and report the problems and what training would do about "
        "them. Exit status 0: training would use every sample; there may be remarks (small images, long or empty "
        "captions, copies). Status 1: training would stop, skip samples, or leave some out. Status 2: the command "
        "is wrong.",
    )  # fmt: skip
    add_source_arguments(
        command, "Folder of images with a metadata.jsonl, tar shards (a folder, a file, a pattern such as "
        "photos-{000..031}.tar), or a dataset of the hub.",
    )  # fmt: skip
    add = command.add_argument
    add("--resolution", type=positive_int, default=512, help="Images with a shorter side, in pixels, are reported.")
    add("--tokenizer", metavar="DIR", help="CLIP tokenizer or pipeline, to count tokens exactly.")
    add("--ranks", type=positive_int, default=1, help="Number of GPUs, to report how shards are divided.")
    add("--workers", type=positive_int, default=1, help="Number of loading threads per GPU, for the same report.")
    command.set_defaults(run=check_data)

    command = commands.add_parser(
        "pack", help="write a data set into tar shards",
        description="Write a data set into tar shards in the WebDataset format, images byte for byte. The same command "
        "resumes an interrupted one. Exit status 1: unusable samples were left out. Status 2: the command is wrong.",
    )  # fmt: skip
    add_source_arguments(
        command, "Folder of images with a metadata.jsonl, a .jsonl file whose rows have a file_name relative to it, "
        "tar shards, or a dataset of the hub.",
    )  # fmt: skip
    add = command.add_argument
    add("output_dir", metavar="OUTPUT_DIR", help="Folder for the shards.")
    add("--shard_size", type=byte_size, default="500MB", metavar="SIZE", help="Largest size of a shard.")
    add("--name", default="photos", help="Beginning of the shards' names.")
    command.set_defaults(run=pack_data)

    command = commands.add_parser(
        "preview", config=False, help="show the samples that a training script would train on",
        description="Put `ppdiffusers-train preview` before your training command: the first samples of that run are "
        "written into preview.png, cropped, mirrored and with the caption as the model gets them. More flags: "
        "--preview_output FILE, --preview_samples N, --json. Exit status 1: one of the samples cannot be used.",
    )  # fmt: skip
    add = command.add_argument
    add("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="Training script and its flags.")
    command.set_defaults(run=preview_training)

    add_launch_command(commands)

    command = commands.add_parser("convert-lora", help="rewrite a LoRA's file for another library")
    add = command.add_argument
    add("source", help="LoRA file, or its folder, from a LoRA script or another trainer.")
    add("--to", choices=FILES, required=True, help="Library to write for; kohya is for ComfyUI and WebUIs.")
    add("--output", required=True, metavar="PATH", help="Output folder, or a file that ends in .safetensors.")
    add("--scale", type=non_negative_float, default=1.0, help="Factor to multiply the updates by.")
    command.set_defaults(run=convert_lora)

    command = commands.add_parser("toy-data", help="write pictures of shapes with captions, to train a small model on")
    add = command.add_argument
    add("output", help="Folder to write, new or empty.")
    add("--count", type=positive_int, required=True, help="Number of pictures.")
    add("--size", type=int, choices=SIZES, default=32, help="Height and width of pictures, in pixels.")
    add("--look", choices=(*LOOKS, MIXED), default="plain", help="Look of the shapes.")
    add("--shard_size", type=byte_size, metavar="SIZE", help="Write tar shards, each at most so large, such as 1MB.")
    add("--seed", type=seed, default=0, help="Seed of the pictures.")
    add("--held_out", action=Flag, help="Write only combinations of shape, colour and background kept out of training.")
    command.set_defaults(run=toy_data)

    command = commands.add_parser(
        "demo", help="train a tiny model on a CPU, in minutes",
        description="Train a tiny pretrained model on pictures of shapes with the script of a job, and write a figure "
        "of training pictures, images generated before and after, and the loss.",
    )  # fmt: skip
    add = command.add_argument
    add("--job", choices=JOBS, default="decoder-lora", help="Job to run.")
    add("--output_dir", default="outputs/demo", metavar="DIR", help="Output folder.")
    add("--max_train_steps", type=positive_int, help="Number of optimizer steps; by default enough for the job.")
    add("--pictures", type=positive_int, help="Number of training pictures; by default enough for the job.")
    command.set_defaults(run=demo)
    return parser


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    if status := args.run(args):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
