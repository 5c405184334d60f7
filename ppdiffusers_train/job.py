"""What every training script does with its flags and its training module."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import contextlib

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import UserError, one_line_errors
from ppdiffusers_train.training import check_run, launch_training_task


def run_job(parser, module_class, argv=None, build_dataset=build_dataset) -> None:
    """The `main` of a training script: flags, data, models, training. A mistake is one line and exit status 2.

    Args:
        parser: of the script's flags.
        module_class: its `DiffusionTrainingModule`, which is built from the flags.
        argv: the command line's words, by default those of this process.
        build_dataset: gives the samples that the flags name.
    """

    @one_line_errors
    def main(argv):
        args = parser.parse_args(argv)
        check_run(args)
        dataset = build_dataset(args)
        module = module_class(args)
        module.inspect_dataset(dataset)
        launch_training_task(module, dataset, args)

    main(argv)


@contextlib.contextmanager
def named_by_flags():
    """Within, a formula's `ValueError` about its parameter `x` is the user's mistake in the flag `--x`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"--{error}") from error
