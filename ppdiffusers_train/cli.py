"""ppdiffusers-train: what there is to do beside training.

ppdiffusers-train convert-lora my-lora --to diffusers --output my-lora-for-torch
ppdiffusers-train toy-data shapes --count 1000 --size 32
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

from pathlib import Path

from ppdiffusers_train.argument_parser import ArgumentParser, Flag, positive_int, seed
from ppdiffusers_train.errors import UserError, one_line_errors
from ppdiffusers_train.models.lora_files import FILES, read_lora, write_lora
from ppdiffusers_train.toy.shapes import LOOKS, SIZES
from ppdiffusers_train.toy.shapes_folder import write_shapes_folder


def convert_lora(args) -> None:
    """Rewrite a LoRA's file for another library."""
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
    updates = read_lora(source)
    write_lora(target, updates, args.to)
    ranks = sorted({update.rank for update in updates.values()})
    print(f"{target}: {len(updates)} layers of rank {', '.join(map(str, ranks))}, for {args.to}")


def toy_data(args) -> None:
    """Draw a folder of training data from the world of shapes."""
    write_shapes_folder(args.output, args.count, args.seed, size=args.size, look=args.look, held_out=args.held_out)
    print(f"{args.output}: {args.count} pictures of {args.size} x {args.size} pixels, with captions")


def build_parser():
    parser = ArgumentParser(prog="ppdiffusers-train", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=ArgumentParser)

    command = commands.add_parser("convert-lora", help="rewrite a LoRA's file for another library")
    command.add_argument("source", help="the file, or a folder with one: what a LoRA script or another trainer wrote")
    command.add_argument("--to", choices=FILES, required=True, help="kohya: ComfyUI and WebUIs")
    command.add_argument("--output", required=True, metavar="PATH", help="folder, or a file that ends in .safetensors")
    command.set_defaults(run=convert_lora)

    command = commands.add_parser("toy-data", help="draw pictures of shapes, with captions, to train a small model on")
    command.add_argument("output", help="folder to write: new, or empty")
    command.add_argument("--count", type=positive_int, required=True, help="number of pictures")
    command.add_argument("--size", type=int, choices=SIZES, default=32, help="height and width, in pixels")
    command.add_argument("--look", choices=LOOKS, default="plain", help="how shapes are drawn")
    command.add_argument("--seed", type=seed, default=0, help="another seed draws other pictures")
    command.add_argument(
        "--held_out",
        action=Flag,
        help="only combinations of shape, colour and background that are never drawn otherwise",
    )
    command.set_defaults(run=toy_data)
    return parser


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
