"""`ppdiffusers-train convert`: writes a pipeline for another library, or into a single file and back."""

import contextlib

from ppdiffusers_train.arguments.jobs import add_single_file_argument
from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.tools.lora import add_variant, new_path


def add_convert_command(commands) -> None:
    """Add the command `convert` to `ppdiffusers-train`."""
    command = commands.add_parser(
        "convert", help="write a pipeline for another library, or as a single file",
        description="Write a pipeline for another library, or as a single file for ComfyUI and WebUIs. Weights keep "
        "their numbers and types.",
    )  # fmt: skip
    add = command.add_argument
    add("source", metavar="SOURCE", help="Read this pipeline: a folder, a single .safetensors file or a hub name.")
    add(
        "--to", choices=("single_file", "diffusers", "ppdiffusers"), required=True,
        help="Write a single file, or a folder for this library.",
    )  # fmt: skip
    add(
        "--output", required=True, metavar="PATH",
        help="Write to this new folder; a single file is its model.safetensors, or this path if it ends in "
        ".safetensors.",
    )  # fmt: skip
    add_single_file_argument(command)
    add_variant(add)
    command.set_defaults(run=convert_pipeline)


def convert_pipeline(args) -> None:
    """Convert, and print what was written and what the new layout does not hold."""
    from ppdiffusers_train.models.conversion import write_converted
    from ppdiffusers_train.models.single_file.reading import FILE, SUFFIXES
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from ppdiffusers_train.runtime.checkpoint import atomic_folder

    quiet_libraries()
    is_file, target = args.to == "single_file", new_path(args.output)
    is_in_folder = target.suffix != ".safetensors"
    if target.suffix in SUFFIXES and (is_in_folder or not is_file):
        expected = "a name that ends in .safetensors, or a folder's" if is_file else "the name of a folder"
        raise UserError(f"--output: {args.output!r} has the name of a {target.suffix} file; expected {expected}")
    with writing("--output: the pipeline", target.parent, kind=UserError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) if is_in_folder else contextlib.nullcontext(target) as path:
            written = path / FILE if is_file and is_in_folder else path
            lines = write_converted(args.source, args.to, written, args.single_file_config, args.variant)
    target = target / FILE if is_file and is_in_folder else target
    for line in lines:
        print(f"{target}: {line}")
