"""Writes the files of the corpus."""

import csv
import json

import numpy as np
from PIL import Image


def pixels(number: int, size=(12, 8)) -> np.ndarray:
    """An image of random pixels that `number` chooses: uint8 [H, W, 3]. `size` is (width, height)."""
    return np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)


def save(path, array, **options) -> np.ndarray:
    """Write pixels into a new file, in the format of its extension; returns them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


def write_jsonl(folder, rows) -> None:
    """Write `rows` into the folder's metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(folder, rows, **options) -> None:
    """Write `rows`, of which the first has the names of the columns, into the folder's metadata.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
