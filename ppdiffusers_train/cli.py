"""ppdiffusers-train: commands around training: check, pack and preview data, launch runs, work with LoRAs, try a demo.

ppdiffusers-train examples my-training
ppdiffusers-train recommend sdxl-lora --memory 12
ppdiffusers-train check my-photos
ppdiffusers-train preview train_text_to_image_sdxl.py --pretrained_model_name_or_path sdxl --train_data_dir my-photos
ppdiffusers-train pack my-photos shards --shard_size 500MB
ppdiffusers-train launch --gpus 0,1 train_text_to_image_sdxl.py --train_data_dir my-photos --output_dir my-sdxl
ppdiffusers-train cache my-sdxl/encoded --train_data_dir my-photos
ppdiffusers-train convert my-sdxl --to single_file --output my-sdxl.safetensors
ppdiffusers-train lora merge --base sdxl --lora my-lora:0.8 --output my-sdxl
ppdiffusers-train push my-sdxl --hub_model_id me/my-sdxl
ppdiffusers-train convert-lora my-lora --to diffusers --output my-lora-for-torch
ppdiffusers-train toy-data shapes --count 1000 --size 32
ppdiffusers-train demo --job lcm-lora
"""

import ppdiffusers_train  # (before paddle)

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

from ppdiffusers_train.arguments.parser import (
    ArgumentParser,
    CommandParser,
    byte_size,
    positive_int,
    repeats,
)
from ppdiffusers_train.errors import UserError, one_line, one_line_errors
from ppdiffusers_train.tools.cache import add_cache_command
from ppdiffusers_train.tools.convert import add_convert_command
from ppdiffusers_train.tools.examples import add_examples_command
from ppdiffusers_train.tools.launch import add_launch_command
from ppdiffusers_train.tools.lora import add_lora_command
from ppdiffusers_train.tools.push import add_push_command
from ppdiffusers_train.tools.recommend import add_recommend_command
from ppdiffusers_train.tools.source_flags import FLAGS, add_source_flags
from ppdiffusers_train.toy.commands import add_toy_commands

# Each command imports what it needs, so that `--help` is fast, and so are the processes that a command starts, which
# import this file as well.


def check_data(args) -> int:
    """Report the problems of a data set. The status is 1 where training would stop or lose samples."""
    from ppdiffusers_train.data.dataset import index_folder
    from ppdiffusers_train.data.inspection import processors
    from ppdiffusers_train.models.text import count_tokens, load_tokenizer
    from ppdiffusers_train.tools.check import Tokens, check, describe_shards

    with stdout_for_result(args.json):
        tokenizer = load_tokenizer(args.tokenizer, "--tokenizer") if args.tokenizer else None
        tokens = Tokens()
        if tokenizer:
            tokens = Tokens(lambda caption: count_tokens(tokenizer, caption), tokenizer.model_max_length, note="")
        source = open_named(args)
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
            log=lambda text: tqdm.write(printable(one_line(text))),
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

    flags = {name: getattr(args, name, None) for name in FLAGS}
    return open_source(args.source, args.image_column, args.caption_column, **flags)


def add_source_arguments(command, what: str) -> None:
    add = command.add_argument
    add("source", metavar="SOURCE", help=what)
    add_source_flags(command)
    add("--processes", type=positive_int, help="Decode images in this many processes; without it, in one per CPU core.")


def build_parser():
    parser = ArgumentParser(config=False, prog="ppdiffusers-train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--version",
        action="version",
        version=f"%(prog)s {ppdiffusers_train.__version__}",
        help="Print the version and exit.",
    )
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
        command, "Read a folder of images with captions, tar shards (a folder, a file, a pattern such as "
        "photos-{000..031}.tar), or a dataset of the hub.",
    )  # fmt: skip
    add = command.add_argument
    add(
        "--repeats", nargs="+", type=repeats, metavar="N",
        help="Report how many samples an epoch has with these --repeats of a training script.",
    )  # fmt: skip
    add(
        "--resolution", type=positive_int, default=512,
        help="Report images whose shorter side has fewer pixels than this.",
    )  # fmt: skip
    add(
        "--tokenizer", metavar="DIR",
        help="Count tokens exactly, with the CLIP tokenizer or pipeline of this folder; without it, they are "
        "estimated.",
    )  # fmt: skip
    add("--ranks", type=positive_int, default=1, help="Report how shards are divided among this many GPUs.")
    add(
        "--workers", type=positive_int, default=1,
        help="Report how shards are divided among this many loading threads per GPU.",
    )  # fmt: skip
    command.set_defaults(run=check_data)

    command = commands.add_parser(
        "pack", help="write a data set into tar shards",
        description="Write a data set into tar shards in the WebDataset format, images byte for byte. The same command "
        "resumes an interrupted one. Exit status 1: unusable samples were left out. Status 2: the command is wrong.",
    )  # fmt: skip
    add_source_arguments(
        command, "Read a folder of images with captions, a .jsonl file whose rows have a file_name relative to "
        "it, tar shards, or a dataset of the hub.",
    )  # fmt: skip
    add = command.add_argument
    add("output_dir", metavar="OUTPUT_DIR", help="Write the shards to this folder.")
    add(
        "--shard_size", type=byte_size, default="500MB", metavar="SIZE",
        help="Write shards of at most this size, such as 500MB or 2GiB.",
    )  # fmt: skip
    add("--name", default="photos", help="Begin the shards' names with this word.")
    command.set_defaults(run=pack_data)

    command = commands.add_parser(
        "preview", config=False, help="show the samples that a training script would train on",
        description="Put `ppdiffusers-train preview` before your training command: the first samples of that run are "
        "written into preview.png, cropped, mirrored and with the caption as the model gets them. More flags: "
        "--preview_output FILE, --preview_samples N, --json. Exit status 1: one of the samples cannot be used.",
    )  # fmt: skip
    add = command.add_argument
    add("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="Name the training script, then its flags.")
    command.set_defaults(run=preview_training)

    add_launch_command(commands)

    add_cache_command(commands)

    add_convert_command(commands)

    add_lora_command(commands)

    add_push_command(commands)

    add_recommend_command(commands)

    add_toy_commands(commands)
    return parser


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    if status := args.run(args):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
