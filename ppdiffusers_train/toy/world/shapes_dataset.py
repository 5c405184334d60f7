"""The world of `shapes.py` as rows for training: drawn when they are asked for, nothing on disk."""

import json

from ppdiffusers_train.toy.world.shapes import LOOKS, sample
from ppdiffusers_train.toy.world.words import name_look


class ShapesDataset:
    """Rows `{"image": RGB PIL image, "caption": str, "name": str}`: samples 0 to `count` - 1 of `seed`.

    Args:
        seed: of the samples, see `shapes.sample`.
        count: number of rows.
        size: height and width of the pictures, in pixels.
        looks: the rows have them in turn.
        held_out: whether to draw the combinations that training never has.
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
        drawn = self.sample(index)
        return {"image": drawn.image, "caption": drawn.caption, "name": self.name(index)}

    def sample(self, index: int):
        """Row `index` with all that it shows: a `shapes.Sample`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        turn, nameless = divmod(index, 2) if self.nameless_looks else (index, False)
        looks = self.nameless_looks if nameless else self.looks
        look = looks[turn % len(looks)]
        drawn = sample(self.seed, index, self.size, look, self.held_out, bool(nameless))
        if self.name_looks and look != "plain" and not nameless:
            return drawn._replace(caption=name_look(drawn.caption, look))
        return drawn

    def name(self, index: int) -> str:
        """How to call row `index` in a message."""
        return f"shape {index} of seed {self.seed}"

    def digest(self) -> str:
        """What tells this data from other data of as many samples."""
        return json.dumps([self.seed, self.size, self.looks, self.held_out, self.name_looks, self.nameless_looks])
