"""Which split a file of tables or shards belongs to, by its name."""

import re

# The words of `datasets` for splits, at the beginning of the name of a file or of a folder.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORDS = {word: split for split, words in SPLITS.items() for word in words}


def split_of(file: str) -> str:
    """The split of a file, by its path relative to the data: `data/test-00000-of-00001.parquet` is of `test`."""
    for part in file.split("/"):
        word = re.match(r"[a-z]+(?=$|[-_.0-9])", part)
        if word and word[0] in WORDS:
            return WORDS[word[0]]
    return "train"
