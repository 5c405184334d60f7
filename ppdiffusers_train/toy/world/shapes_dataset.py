"""The world of `shapes.py` as rows for training, rendered on access, with nothing on disk."""

import json

from ppdiffusers_train.toy.world.shapes import LOOKS, sample
from ppdiffusers_train.toy.world.words import name_look


class ShapesDataset:
    """Rows `{"image": RGB PIL image, "caption": str, "name": str}`: samples 0 to `count` - 1 of `seed`.

    Args:
        seed: of the samples, see `shapes.sample`.
        count: number of rows.
        size: height and width of the pictures, in pixels.
        looks: the looks that rows have in turn.
        held_out: whether to sample the combinations that are held out of training.
        name_looks: whether a caption names the look of its picture where it is not plain.
        nameless_looks: if any, every second row has one of these instead, in colours that no caption names.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        size: int = 32,
        looks=LOOKS,
        held_out: bool = False,
        name_looks: bool = False,
        nameless_looks=(),
    ):
        self.seed, self.count, self.size, self.held_out = seed, count, size, held_out
        self.looks, self.nameless_looks, self.name_looks = tuple(looks), tuple(nameless_looks), name_looks

    def __len__(self):
        return self.count

    def __getitem__(self, index: int) -> dict:
        row = self.sample(index)
        return {"image": row.image, "caption": row.caption, "name": self.name(index)}

    def sample(self, index: int):
        """Row `index` with its scene: a `shapes.Sample`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        turn, nameless = divmod(index, 2) if self.nameless_looks else (index, False)
        looks = self.nameless_looks if nameless else self.looks
        look = looks[turn % len(looks)]
        row = sample(self.seed, index, self.size, look, self.held_out, bool(nameless))
        if self.name_looks and look != "plain" and not nameless:
            return row._replace(caption=name_look(row.caption, look))
        return row

    def name(self, index: int) -> str:
        """The name of row `index` in messages."""
        return f"shape {index} of seed {self.seed}"

    def digest(self) -> str:
        """A text that identifies the data."""
        return json.dumps([self.seed, self.size, self.looks, self.held_out, self.name_looks, self.nameless_looks])
