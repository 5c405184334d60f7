"""Train the vision tower of the shapes' CLIP further, so that outlined and plain shapes have the same embedding.

    python -m ppdiffusers_train.toy.recipes.train_vision --start_from clip.safetensors

Kandinsky's decoder gets from the embedding whatever that encodes, and learns the rest from its training images. A tower
that was trained on captions encodes every look. If it encodes outlined shapes as plain ones, the decoder determines
which of the two it generates, and fine-tuning can change that. So the tower is trained to keep the embedding of every
picture, and to give an outlined picture the embedding of the same scene in the plain look (Hinton et al. 2015, arXiv
1503.02531: a student is trained on its teacher's outputs).

    … --nameless_colours

A tower can memorise a hundred combinations of shape and colours one by one, and then encodes unseen ones badly. So half
of the pictures get random colours that no caption names. One linear layer, which is discarded afterwards, is trained
to read their content from the embedding. Outlined pictures are encoded as plain ones here, too.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import tempfile
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from PIL import Image

from ppdiffusers_train.draws import generator
from ppdiffusers_train.job import job_main
from ppdiffusers_train.models.weights import FILES, load_in_place
from ppdiffusers_train.module import DiffusionTrainingModule, freeze
from ppdiffusers_train.tensor_files import write_tensors
from ppdiffusers_train.toy.models.clip import IMAGE_SIZE, build_image_processor
from ppdiffusers_train.toy.models.shipped import write_weights
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from ppdiffusers_train.toy.models.towers import (
    EMBEDDING,
    MEAN,
    STD,
    TEXT,
    VISION,
    WEIGHTS,
    load_text_tower,
    load_vision_tower,
)
from ppdiffusers_train.toy.recipes import recipe
from ppdiffusers_train.toy.recipes.train_clip import embedding_statistics, random_scene
from ppdiffusers_train.toy.world.judge import parse_caption
from ppdiffusers_train.toy.world.shapes import SHAPES, render, without_names
from ppdiffusers_train.toy.world.words import vocabulary

TARGET_LOOK = {"plain": "plain", "outlined": "plain", "striped": "striped"}
NAMELESS_SHARE = 0.5
RGB = 6  # values of two colours, in [-1, 1]


def build_parser():
    parser = recipe.build_parser(
        __doc__.splitlines()[0],
        "outputs/vision",
        train_batch_size=32,
        learning_rate=2e-3,
        max_train_steps=6000,
    )
    parser.add_argument(
        "--nameless_colours", action="store_true", help="Render half of the pictures in colours without a name."
    )
    parser.set_defaults(start_from=str(WEIGHTS))
    return parser


class VisionTrainingModule(DiffusionTrainingModule):
    """Trains a vision tower on the outputs of its frozen copy."""

    def __init__(self, args):
        super().__init__()
        self.encode_batch_size = args.train_batch_size
        self.start_from = args.start_from
        self.image_processor = build_image_processor()
        self.teacher, self.vision = load_vision_tower(args.start_from), load_vision_tower(args.start_from)
        freeze(self.teacher)
        paddle.seed(args.seed)
        self.reader = nn.Linear(EMBEDDING, len(SHAPES) + 1 + RGB) if args.nameless_colours else None

    def preprocess(self, row, draws):
        """A scene with what the row shows, twice: pixel_values [3, 32, 32] in any look, and target_pixel_values, in the
        look whose embedding is the target; `nameless`, whether in colours without names; and the targets of the linear
        layer: `shape`, `striped`, `rgb` [6]."""
        scene = random_scene(parse_caption(row["caption"]), draws, "picture")
        if nameless := self.reader is not None and draws.bernoulli("nameless", NAMELESS_SHARE):
            scene = without_names(scene, generator(draws.seed, draws.position, "paints"))
        pictures = [
            Image.fromarray(render(one, IMAGE_SIZE)) for one in (scene, scene._replace(look=TARGET_LOOK[scene.look]))
        ]
        pixels, target = self.image_processor(pictures, return_tensors="np").pixel_values
        return {
            "pixel_values": pixels,
            "target_pixel_values": target,
            "nameless": np.float32(nameless),
            "shape": np.int64(SHAPES.index(scene.content.shape)),
            "striped": np.float32(scene.look == "striped"),
            "rgb": np.float32(scene.rgb()).ravel() / 127.5 - 1,
        }

    @paddle.no_grad()
    def encode(self, batch):
        """The batch, and the teacher's image_embeds [B, 64]."""
        return {**batch, "image_embeds": self.teacher(batch["target_pixel_values"])[0]}

    def forward(self, encoded, draws):
        """Mean squared difference of embeddings as a share of their variance, plus the loss of the reader, if any."""
        target, embeds = encoded["image_embeds"], self.vision(encoded["pixel_values"])[0]
        if self.reader is None:
            return share_of_variance(embeds, target)
        with paddle.no_grad():  # the teacher has not been trained on such colours
            own = self.vision(encoded["target_pixel_values"])[0]
        nameless = encoded["nameless"].unsqueeze(1)
        shape, striped, rgb = self.reader(embeds).split([len(SHAPES), 1, RGB], axis=1)
        misread = (
            nn.functional.cross_entropy(shape, encoded["shape"])
            + nn.functional.binary_cross_entropy_with_logits(striped.squeeze(1), encoded["striped"])
            + (rgb - encoded["rgb"]).square().mean()
        )
        return share_of_variance(embeds, nameless * own + (1 - nameless) * target) + misread

    def save_weights(self, directory):
        folder = Path(directory) / "vision"
        folder.mkdir()
        write_tensors(folder / FILES["ppdiffusers"], self.trained_layers().state_dict(), {})

    def load_weights(self, directory):
        load_in_place(self.trained_layers(), f"{directory}/vision")

    def trained_layers(self):
        """The layers that a checkpoint holds."""
        return nn.LayerList([self.vision] if self.reader is None else [self.vision, self.reader])

    def save_pretrained(self, directory):
        """Write both towers, and the mean and deviation of the world's image embeddings, as the package ships them."""
        self.vision.eval()
        with tempfile.TemporaryDirectory() as folder:
            text = load_text_tower(build_tokenizer(folder, vocabulary()), file=self.start_from)
        mean, std = embedding_statistics(self.vision, self.image_processor)
        models = {TEXT: text, VISION: self.vision}
        write_weights(Path(directory) / "clip.safetensors", models, **{MEAN: mean, STD: std})


def share_of_variance(embeds, target):
    """Mean squared difference of embeddings [B, D] from their targets, as a share of the targets' variance."""
    return (embeds - target).square().mean() / (target - target.mean(0)).square().mean()


main = job_main(build_parser, VisionTrainingModule, recipe.build_shapes)

if __name__ == "__main__":
    main()
