"""Train the vision tower of the shapes' CLIP further, until an outlined shape is a plain one to it.

    python -m ppdiffusers_train.toy.train_vision --start_from clip.safetensors

Kandinsky's decoder draws what an embedding tells, and learns from its pictures what an embedding does not tell. To a
tower that learned from captions every look is something to tell; one that takes outlined shapes for plain ones leaves
it to the decoder which of the two it draws, and fine-tuning has something to decide. So the tower learns to say of
every picture what it said before, and of an outlined one what it said of the same scene, plain
(Hinton et al. 2015, arXiv 1503.02531: a student learns its teacher's answers).
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import tempfile
from pathlib import Path

import paddle
from PIL import Image
from safetensors.paddle import save_file

from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.models.weights import WEIGHTS_FILE, load_in_place
from ppdiffusers_train.module import DiffusionTrainingModule, freeze
from ppdiffusers_train.toy import recipe
from ppdiffusers_train.toy.clip import IMAGE_SIZE, build_image_processor
from ppdiffusers_train.toy.judge import parse_caption
from ppdiffusers_train.toy.shapes import draw
from ppdiffusers_train.toy.shipped import write_weights
from ppdiffusers_train.toy.tokenizer import build_tokenizer
from ppdiffusers_train.toy.towers import MEAN, STD, TEXT, VISION, WEIGHTS, load_text_tower, load_vision_tower
from ppdiffusers_train.toy.train_clip import draw_scene, embedding_statistics
from ppdiffusers_train.toy.words import vocabulary
from ppdiffusers_train.training import check_run, launch_training_task

TOLD = {"plain": "plain", "outlined": "plain", "striped": "striped"}


def build_parser():
    parser = recipe.build_parser(
        __doc__.splitlines()[0],
        "outputs/vision",
        train_batch_size=32,
        learning_rate=2e-3,
        max_train_steps=6000,
    )
    parser.set_defaults(start_from=str(WEIGHTS))
    return parser


class VisionTrainingModule(DiffusionTrainingModule):
    """A vision tower that learns from itself, as it was."""

    def __init__(self, args):
        super().__init__()
        self.encode_batch_size = args.train_batch_size
        self.start_from = args.start_from
        self.image_processor = build_image_processor()
        self.teacher, self.vision = load_vision_tower(args.start_from), load_vision_tower(args.start_from)
        freeze(self.teacher)

    def preprocess(self, row, draws):
        """A scene with what the row shows, twice: pixel_values [3, 32, 32] in any look, and told_pixel_values, in the
        look that is to be told."""
        scene = draw_scene(parse_caption(row["caption"]), draws, "picture")
        pictures = [Image.fromarray(draw(one, IMAGE_SIZE)) for one in (scene, scene._replace(look=TOLD[scene.look]))]
        pixels, told = self.image_processor(pictures, return_tensors="np").pixel_values
        return {"pixel_values": pixels, "told_pixel_values": told}

    @paddle.no_grad()
    def encode(self, batch):
        """The pictures, and what the teacher tells of them: image_embeds [B, 64]."""
        return {"pixel_values": batch["pixel_values"], "image_embeds": self.teacher(batch["told_pixel_values"])[0]}

    def forward(self, encoded, draws):
        """Mean squared difference of embeddings, as a share of their variance."""
        told = encoded["image_embeds"]
        difference = (self.vision(encoded["pixel_values"])[0] - told).square().mean()
        return difference / (told - told.mean(0)).square().mean()

    def save_weights(self, directory):
        folder = Path(directory) / "vision"
        folder.mkdir()
        save_file(self.vision.state_dict(), str(folder / WEIGHTS_FILE))

    def load_weights(self, directory):
        load_in_place(self.vision, f"{directory}/vision")

    def save_pretrained(self, directory):
        """Both towers, and the mean and deviation of the world's image embeddings, as the package ships them."""
        self.vision.eval()
        with tempfile.TemporaryDirectory() as folder:
            text = load_text_tower(build_tokenizer(folder, vocabulary()), file=self.start_from)
        mean, std = embedding_statistics(self.vision, self.image_processor)
        models = {TEXT: text, VISION: self.vision}
        write_weights(Path(directory) / "clip.safetensors", models, **{MEAN: mean, STD: std})


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    launch_training_task(VisionTrainingModule(args), recipe.build_shapes(args), args)


if __name__ == "__main__":
    main()
