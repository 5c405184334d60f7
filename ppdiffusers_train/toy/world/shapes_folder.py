"""Pictures of shapes as a folder of images, which every training script can read."""

import json
from pathlib import Path

from tqdm import tqdm

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.runtime.checkpoint import atomic_folder
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset


def write_shapes_folder(folder, shapes: ShapesDataset, text_files: bool = False) -> None:
    """Write samples as PNG files with a `metadata.jsonl`: the folder appears only when it is complete.

    Args:
        folder: a path that does not exist yet, or an empty folder.
        text_files: whether captions are written into text files beside the images instead.
    Raises:
        UserError: `folder` is not empty, or cannot be written.
    """
    target = Path(folder).resolve()
    with writing("pictures", folder, kind=UserError):
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{str(folder)!r} is not empty; expected a new folder, or an empty one")
        with atomic_folder(target) as inside:
            rows = []
            for index in tqdm(range(len(shapes)), desc="rendering", unit="image", delay=5):
                sample = shapes.sample(index)
                image = inside / f"{index:06}.png"
                sample.image.save(image)
                if text_files:
                    image.with_suffix(".txt").write_text(f"{sample.caption}\n", encoding="utf-8")
                else:
                    row = {"file_name": image.name, "text": sample.caption}
                    rows.append(json.dumps(row, ensure_ascii=False) + "\n")
            if rows:
                (inside / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
