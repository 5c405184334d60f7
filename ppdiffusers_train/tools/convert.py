"""`ppdiffusers-train convert`: writes a pipeline for another library, or into a single file and back."""

import contextlib

from ppdiffusers_train.arguments.jobs import add_single_file_argument
from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.tools.lora import new_path


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
    command.set_defaults(run=convert_pipeline)


def convert_pipeline(args) -> None:
    """Convert, and print what was written and what the new layout does not hold."""
    from ppdiffusers_train.models.conversion import write_converted
    from ppdiffusers_train.models.single_file.reading import FILE
    from ppdiffusers_train.reporting.quiet import quiet_libraries
    from ppdiffusers_train.runtime.checkpoint import atomic_folder

    quiet_libraries()
    is_file = args.to == "single_file"
    target = new_path(args.output)
    if is_file and target.suffix != ".safetensors":
        target = target / FILE
    with writing("--output: the pipeline", target.parent, kind=UserError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext(target) if is_file else atomic_folder(target) as path:
            lines = write_converted(args.source, args.to, path, args.single_file_config)
    for line in lines:
        print(f"{target}: {line}")
