"""The flags of tools that say how to read a data set."""

from ppdiffusers_train.arguments import add_caption_arguments
from ppdiffusers_train.arguments.parser import Flag

FLAGS = (  # those that `sources.open_source` takes
    *("dataset_config_name", "dataset_split", "cache_dir", "index_dir"),
    *("caption", "caption_separator", "repeats"),
)


def add_source_flags(command) -> None:
    """Add the flags that say how to read a data set, and how to print."""
    add = command.add_argument
    add("--dataset_config_name", help="Use this configuration of the dataset, if it has several.")
    add("--dataset_split", default="train", metavar="SPLIT", help="Read this split of a table, such as validation.")
    add("--image_column", default="image", help="Read images from this column.")
    add(
        "--caption_column", default="text",
        help="Read captions from this column, or from this field of a shard's .json files.",
    )  # fmt: skip
    add_caption_arguments(command)
    add("--cache_dir", metavar="DIR", help="Keep downloads in this folder; without it, in Hugging Face's cache.")
    add(
        "--index_dir", metavar="DIR",
        help="Keep indices of data sets in this folder; without it, in --cache_dir or the user's cache.",
    )  # fmt: skip
    add("--json", action=Flag, help="Print the result as one JSON document.")
