"""ppdiffusers-train: what there is to do beside training.

ppdiffusers-train convert-lora my-lora --to diffusers --output my-lora-for-torch
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

from pathlib import Path

from ppdiffusers_train.arguments import ArgumentParser
from ppdiffusers_train.errors import UserError, one_line_errors
from ppdiffusers_train.models.lora_files import FILES, read_lora, write_lora


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


def build_parser():
    parser = ArgumentParser(prog="ppdiffusers-train", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=ArgumentParser)

    command = commands.add_parser("convert-lora", help="rewrite a LoRA's file for another library")
    command.add_argument("source", help="the file, or a folder with one: what a LoRA script or another trainer wrote")
    command.add_argument("--to", choices=FILES, required=True, help="kohya: ComfyUI and WebUIs")
    command.add_argument("--output", required=True, metavar="PATH", help="folder, or a file that ends in .safetensors")
    command.set_defaults(run=convert_lora)
    return parser


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
