"""What each of several ranks does in a test: look at the images of a data set, and count the files that it opens."""

import ppdiffusers_train  # noqa: F401

import json
import sys
from pathlib import Path

from ppdiffusers_train.arguments import add_data_arguments
from ppdiffusers_train.arguments.parser import ArgumentParser
from ppdiffusers_train.data.dataset import build_dataset, index_folder
from ppdiffusers_train.data.image_index import index_images
from ppdiffusers_train.runtime.distributed import start_ranks


def main(argv):
    """`argv`: folders of data, one for each rank or for all; the folder of the index; a folder for results."""
    *folders, index, results = argv
    opened = []
    sys.addaudithook(lambda event, given: opened.append(given[0]) if event == "open" and "jpg" in str(given[0]) else 0)
    ranks = start_ranks(timeout=60)
    parser = ArgumentParser()
    add_data_arguments(parser)
    folder = folders[ranks.rank % len(folders)]
    args = parser.parse_args([f"--train_data_dir={folder}", f"--index_dir={index}"])
    args.seed = 0
    rows = build_dataset(args)
    index_images(rows, ranks, index_folder(args))
    found = {"opened": len(opened), "digest": rows.images_digest(), "sizes": rows.image_sizes().tolist()}
    (Path(results) / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.gather_objects(None)  # the store is in rank 0's process, which must not end before the others are done
