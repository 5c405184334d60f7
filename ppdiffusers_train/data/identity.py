"""Compares ranks' copies of the data: names, sizes, captions and contents of all samples."""

import json

from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.errors import hide_tokens
from ppdiffusers_train.runtime.agreement import agree, digest
from ppdiffusers_train.runtime.distributed import Ranks


def agree_on_data(dataset, ranks: Ranks) -> None:
    """Compare the ranks' data, whose images have been looked at. File times do not count: copies do not keep them.

    Raises:
        UserError: it differs; the message names the first row that does.
    """
    if ranks.world_size == 1:
        return
    agree(ranks, {"number of samples": len(dataset)})
    if not isinstance(dataset, Rows):
        agree(ranks, {f"shard {i}": hide_tokens(name) for i, name in enumerate(getattr(dataset, "shards", []))})
        return
    blocks = [digest(json.dumps(described(dataset, *block)).encode()) for block in dataset.blocks()]
    parts = ranks.gather_objects(blocks)
    for block, *digests in zip(dataset.blocks(), *parts):
        if len(set(digests)) > 1:
            agree(ranks, described(dataset, *block))


def described(rows: Rows, start: int, stop: int) -> dict:
    """Image names, sizes in bytes, captions and hashes of the contents of rows: {description: value}."""
    names, sizes = rows.stored_names(start, stop), rows.stored_sizes(start, stop)
    texts = rows.stored_captions(start, stop)
    found = {}
    for row, name, size, text in zip(range(start, stop), names, sizes, texts):
        found[f"image of row {row}"] = name
        found[f"size of {name} (row {row})"] = size
        found[f"caption of {name} (row {row})"] = text
        found[f"content of {name} (row {row})"] = rows.facts.problems.get(row) or rows.facts.digests[row].hex()
    masks = rows.masks
    for row, name in zip(range(start, min(stop, len(masks))), names) if masks else ():
        found[f"mask of {name} (row {row})"] = masks.facts.problems.get(row) or masks.facts.digests[row].hex()
    return found
