"""Compares ranks' copies of the data: names, sizes and captions of all samples, and the contents of some."""

import json

import numpy as np

from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.errors import BadSampleError, hide_tokens
from ppdiffusers_train.runtime.agreement import agree, digest
from ppdiffusers_train.runtime.distributed import Ranks

AT_ONCE = 1000  # rows that are hashed together
READ = 64  # images, evenly spaced, whose contents are compared


def agree_on_data(dataset, ranks: Ranks) -> None:
    """Compare the ranks' data. Only a few images are read. File times do not count, since copies do not keep them.

    Raises:
        UserError: it differs; the message names the first row that does.
    """
    if ranks.world_size == 1:
        return
    agree(ranks, {"number of samples": len(dataset)})
    if not isinstance(dataset, Rows):
        agree(ranks, {f"shard {i}": hide_tokens(name) for i, name in enumerate(getattr(dataset, "shards", []))})
        return
    starts = range(0, len(dataset), AT_ONCE)
    blocks = [digest(json.dumps(described(dataset, start)).encode()) for start in starts]
    parts = ranks.gather_objects(blocks)
    for start, *digests in zip(starts, *parts):
        if len(set(digests)) > 1:
            agree(ranks, described(dataset, start))
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), READ)).astype(int)).tolist()
    names = [f"content of {dataset.stored_names(row, row + 1)[0]} (row {row})" for row in rows]
    agree(ranks, {name: content(dataset, row) for name, row in zip(names, rows)})


def described(rows: Rows, start: int) -> dict:
    """Image names, sizes in bytes and captions of up to `AT_ONCE` rows: {description: value}."""
    stop = min(start + AT_ONCE, len(rows))
    names, sizes = rows.stored_names(start, stop), rows.stored_sizes(start, stop)
    texts = rows.texts[start:stop][rows.caption_column]
    found = {}
    for row, name, size, text in zip(range(start, stop), names, sizes, texts):
        found[f"image of row {row}"] = name
        found[f"size of {name} (row {row})"] = size
        found[f"caption of {name} (row {row})"] = text
    return found


def content(rows: Rows, row: int) -> str:
    """A hash of a stored image, or a text that it cannot be read."""
    try:
        return rows.image_digest(row).hex()
    except BadSampleError:
        return "cannot be read"
