"""The commands `toy-data` and `demo` of `ppdiffusers-train`.

Each command imports what it needs, so that `--help` is fast.
"""

from ppdiffusers_train.arguments.parser import Flag, byte_size, positive_int, seed
from ppdiffusers_train.errors import scratch_folder
from ppdiffusers_train.toy.demo.jobs import JOBS
from ppdiffusers_train.toy.world.looks import LOOKS, SIZES

MIXED = "mixed"  # all looks in turn


def add_toy_commands(commands) -> None:
    """Add the commands to `ppdiffusers-train`."""
    command = commands.add_parser(
        "toy-data", help="write pictures of shapes with captions, to train a small model on",
        description="Write pictures of shapes with captions, to train a small model on.",
    )  # fmt: skip
    add = command.add_argument
    add("output", metavar="OUTPUT", help="Write to this folder, new or empty.")
    add("--count", type=positive_int, required=True, help="Write this many pictures.")
    add("--size", type=int, choices=SIZES, default=32, help="Write pictures of this height and width, in pixels.")
    add("--look", choices=(*LOOKS, MIXED), default="plain", help="Draw the shapes in this look.")
    add(
        "--shard_size", type=byte_size, metavar="SIZE",
        help="Write tar shards of at most this size, such as 1MB; without it, a folder of images.",
    )  # fmt: skip
    add("--seed", type=seed, default=0, help="Choose the pictures at random by this seed.")
    add("--text_files", action=Flag, help="Write captions to text files beside the pictures, not to a metadata.jsonl.")
    add(
        "--held_out", action=Flag,
        help="Write only combinations of shape, colour and background that are kept out of training.",
    )  # fmt: skip
    command.set_defaults(run=toy_data)

    command = commands.add_parser(
        "demo", help="train a tiny model on a CPU, in minutes",
        description="Train a tiny pretrained model on pictures of shapes with the script of a job, and write a figure "
        "of training pictures, images generated before and after, and the loss.",
    )  # fmt: skip
    add = command.add_argument
    add("--job", choices=JOBS, default="decoder-lora", help="Run this job.")
    add("--output_dir", default="outputs/demo", metavar="DIR", help="Write the results to this folder.")
    add(
        "--max_train_steps", type=positive_int,
        help="Train for this many optimizer steps; without it, for as many as the job needs.",
    )  # fmt: skip
    add("--pictures", type=positive_int, help="Train on this many pictures; without it, on as many as the job needs.")
    command.set_defaults(run=demo)


def toy_data(args) -> None:
    """Write training data of the world of shapes, as a folder or as shards."""
    from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset
    from ppdiffusers_train.toy.world.shapes_folder import write_shapes_folder

    looks = LOOKS if args.look == MIXED else (args.look,)
    shapes = ShapesDataset(args.seed, args.count, args.size, looks, args.held_out)
    with scratch_folder("pictures") as scratch:
        folder = scratch / "shapes" if args.shard_size else args.output
        write_shapes_folder(folder, shapes, args.text_files)
        if args.shard_size:
            from ppdiffusers_train.tools.pack import pack
            from ppdiffusers_train.tools.sources import open_source

            source = open_source(str(folder))
            pack(source, args.output, args.shard_size, "shapes", "text", processes=1, log=print)
    print(f"{args.output}: {args.count} pictures of {args.size} x {args.size} pixels, with captions")


def demo(args) -> None:
    """Train a tiny model and show the result."""
    from ppdiffusers_train.toy.demo.demo import run_demo

    steps = ["--max_train_steps", str(args.max_train_steps)] if args.max_train_steps else []
    run_demo(args.job, args.output_dir, *steps, pictures=args.pictures)
