"""Pictures of shapes as a folder of images, which every training script can read."""

import json
from pathlib import Path

from tqdm import tqdm

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.runtime.checkpoint import atomic_folder
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset


def write_shapes_folder(folder, shapes: ShapesDataset) -> None:
    """Write samples as PNG files with a `metadata.jsonl`: the folder appears only when it is complete.

    Args:
        folder: a path that does not exist yet, or an empty folder.
    Raises:
        UserError: `folder` is not empty, or cannot be written.
    """
    target = Path(folder).resolve()
    with writing("pictures", folder, kind=UserError):
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{str(folder)!r} is not empty; expected a new folder, or an empty one")
        with atomic_folder(target) as inside, open(inside / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for index in tqdm(range(len(shapes)), desc="rendering", unit="image", delay=5):
                sample = shapes.sample(index)
                row = {"file_name": f"{index:06}.png", "text": sample.caption}
                sample.image.save(inside / row["file_name"])
                metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
