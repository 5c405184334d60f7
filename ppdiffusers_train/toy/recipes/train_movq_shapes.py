"""Train the toy's MoVQ further, on shapes; its weights are shipped as `weights/movq_shapes.safetensors`.

    python -m ppdiffusers_train.toy.recipes.train_movq_shapes

It starts from the MoVQ of photographs, which already reconstructs colours and edges and uses its whole codebook.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

from ppdiffusers_train.data.transforms import normalize_pixels
from ppdiffusers_train.job import job_main
from ppdiffusers_train.toy.models.movq import WEIGHTS
from ppdiffusers_train.toy.models.shipped import load_weights
from ppdiffusers_train.toy.recipes import recipe
from ppdiffusers_train.toy.recipes.train_movq import MoVQTrainingModule


def build_parser():
    return recipe.build_parser(
        __doc__.splitlines()[0],
        "outputs/movq_shapes",
        train_batch_size=8,
        learning_rate=2e-3,
        max_train_steps=600,
        resolution=32,
        start_from=str(WEIGHTS),
    )


class ShapesMoVQTrainingModule(MoVQTrainingModule):
    """Trains all of a MoVQ to reconstruct whole pictures of shapes."""

    shipped_as = "movq_shapes.safetensors"

    def __init__(self, args):
        super().__init__(args)
        load_weights(self.movq, args.start_from)

    def preprocess(self, row, draws):
        """pixel_values [3, 32, 32]."""
        return {"pixel_values": normalize_pixels(row["image"])}


main = job_main(build_parser, ShapesMoVQTrainingModule, recipe.build_shapes)

if __name__ == "__main__":
    main()
