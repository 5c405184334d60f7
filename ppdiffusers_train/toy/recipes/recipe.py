"""What the recipes of the shapes' models share: their flags and their data."""

from ppdiffusers_train.arguments import (
    ArgumentParser,
    add_output_arguments,
    add_reporting_arguments,
    add_training_arguments,
)
from ppdiffusers_train.toy.world.shapes import LOOKS
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset

# Flags that the loop reads and that make no sense here: pictures are rendered on the fly, and none is broken.
NOT_OFFERED = {
    "encoded_cache": None,
    "encoded_cache_dir": None,
    "max_bad_samples": 0,
    "dataloader_num_workers": 0,
    "validation_prompts": None,
    "validation_prompts_file": None,
}


def build_parser(description: str, output_dir: str, train_batch_size: int, **defaults) -> ArgumentParser:
    """The loop's flags; `defaults` are the recipe's."""
    parser = ArgumentParser(description=description)
    add_training_arguments(parser, weight_decay=0.0, train_batch_size=train_batch_size)
    add_output_arguments(parser, output_dir=output_dir)
    add_reporting_arguments(parser)
    parser.add_argument("--start_from", metavar="FILE", help="File of weights of another run to start from.")
    parser.set_defaults(seed=0, lr_scheduler="cosine", lr_warmup_steps=50, **NOT_OFFERED, **defaults)
    return parser


def build_shapes(args) -> ShapesDataset:
    """As many pictures as the run needs, so that none is repeated."""
    count = args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps
    return ShapesDataset(args.seed, count, looks=LOOKS)
