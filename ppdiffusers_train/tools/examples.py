"""`ppdiffusers-train examples`: a copy of the training scripts, which are made to be read and edited."""

import shutil
from pathlib import Path

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.tools.example_files import EXAMPLES, example_files


def add_examples_command(commands) -> None:
    """Add the command `examples` to `ppdiffusers-train`."""
    command = commands.add_parser(
        "examples", config=False, help="copy the training scripts, with photographs and notebooks",
        description="Copy the training scripts of all families, their run.sh and guides, the photographs and the "
        "notebooks into a folder, to run and edit them there.",
    )  # fmt: skip
    command.add_argument("output_dir", metavar="DIR", help="Write to this folder, new or empty.")
    command.set_defaults(run=lambda args: copy_examples(args.output_dir))


def copy_examples(output_dir: str) -> None:
    """Copy the examples into a folder.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    files, target = example_files(EXAMPLES), Path(output_dir)
    with writing("DIR: the examples", output_dir, "those that were copied are incomplete", UserError):
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise UserError(f"DIR: {output_dir!r} is not empty; expected a new or an empty folder")
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(EXAMPLES / file, target / file)
    scripts = sum(file.suffix == ".py" for file in files)
    print(
        f"{output_dir}: {scripts} training scripts, photographs and notebooks. Begin with README.md; "
        "the pages that it links to are in the project's docs/, which is not copied."
    )
