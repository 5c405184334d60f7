r"""Train the shapes' CLIP; its weights are shipped as `weights/clip.safetensors`.

    python -m ppdiffusers_train.toy.train_clip
    python -m ppdiffusers_train.toy.train_clip --output_dir outputs/clip_further --seed 1 --max_train_steps 800 \
        --start_from outputs/clip/checkpoint-500/clip/diffusion_paddle_model.safetensors

In a batch, each caption, English or Chinese, has to find its picture, and each picture its caption (Radford et al.
2021, arXiv 2103.00020, section 2.3). Colours are soon learned and shapes are not, as few pictures of a batch differ in
nothing else: so each caption's picture is given rivals, the same colours in other shapes (hard negatives).
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import math
import tempfile
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from PIL import Image
from safetensors.paddle import save_file

from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.models.weights import WEIGHTS_FILE, load_in_place
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.toy import recipe
from ppdiffusers_train.toy.judge import parse_caption
from ppdiffusers_train.toy.shapes import CONTENTS, MARGIN, RADIUS, SHAPES, Scene, draw, is_held_out
from ppdiffusers_train.toy.shapes_dataset import ShapesDataset
from ppdiffusers_train.toy.shipped import load_weights, write_weights
from ppdiffusers_train.toy.tokenizer import build_tokenizer
from ppdiffusers_train.toy.towers import (
    IMAGE_SIZE,
    MEAN,
    STD,
    TEXT,
    VISION,
    build_image_processor,
    build_text_tower,
    build_vision_tower,
)
from ppdiffusers_train.training import check_run, launch_training_task

FIRST_LOGIT_SCALE, MAX_LOGIT_SCALE = 1 / 0.07, 100.0  # the paper's
MEASURED_PICTURES = 2000


def build_parser():
    return recipe.build_parser(
        __doc__.splitlines()[0],
        "outputs/clip",
        train_batch_size=32,
        learning_rate=2e-3,
        adam_beta2=0.98,  # the paper's, for transformers of pictures
        max_train_steps=600,
    )


class CLIPTrainingModule(DiffusionTrainingModule):
    """A text tower, a vision tower and the temperature of their similarities learn."""

    def __init__(self, args):
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = build_tokenizer(folder)
        self.image_processor = build_image_processor()
        paddle.seed(args.seed)
        self.text, self.vision = build_text_tower(self.tokenizer), build_vision_tower()
        if args.start_from:
            load_weights(self.text, args.start_from, TEXT)
            load_weights(self.vision, args.start_from, VISION)
        self.log_scale = self.create_parameter(
            [1], default_initializer=nn.initializer.Constant(math.log(FIRST_LOGIT_SCALE))
        )

    def preprocess(self, row, draws):
        """input_ids [77]; pixel_values [4, 3, 32, 32] of the picture and its rivals; `contents` [4], what they show."""
        content = parse_caption(row["caption"])
        contents = [content, *(content._replace(shape=shape) for shape in SHAPES if shape != content.shape)]
        # Instead of what training must not see there is one more picture of the caption's own content.
        contents = [content if is_held_out(one) else one for one in contents]
        images = [row["image"], *(draw_anywhere(one, draws, f"rival_{i}") for i, one in enumerate(contents[1:]))]
        return {
            "input_ids": tokenize(self.tokenizer, row["caption"])[0],
            "pixel_values": self.image_processor(images, return_tensors="np").pixel_values,
            "contents": np.array([CONTENTS.index(one) for one in contents]),
        }

    def encode(self, batch):
        """Nothing is frozen: the batch itself."""
        return batch

    def forward(self, encoded, draws):
        """Cross entropy of finding each caption's picture among all, and of finding each picture's caption."""
        input_ids, contents = encoded["input_ids"], encoded["contents"]
        size, pictures_each = contents.shape
        # Attention is causal: nothing behind the first end token has a part in the caption's embedding.
        ends = (input_ids == self.tokenizer.eos_token_id).astype("int64").argmax(1)
        texts = unit(self.text(input_ids[:, : int(ends.max()) + 1])[0])
        pictures = unit(self.vision(encoded["pixel_values"].flatten(0, 1))[0])
        scale = self.log_scale.clip(max=math.log(MAX_LOGIT_SCALE)).exp()
        answers = paddle.arange(size)
        own = nn.functional.one_hot(answers * pictures_each, size * pictures_each)
        # Another picture of the same content is no wrong answer.
        same_content = (contents[:, :1] == contents.flatten()).astype("float32")
        logits = scale * texts @ pictures.T - 1e4 * (same_content - own)
        find_picture = nn.functional.cross_entropy(logits, answers * pictures_each)
        find_caption = nn.functional.cross_entropy(logits[:, ::pictures_each].T, answers)
        return (find_picture + find_caption) / 2

    def save_weights(self, directory):
        folder = Path(directory) / "clip"
        folder.mkdir()
        save_file(self.state_dict(), str(folder / WEIGHTS_FILE))

    def load_weights(self, directory):
        load_in_place(self, f"{directory}/clip")

    def save_pretrained(self, directory):
        """The towers, and the mean and deviation of the world's image embeddings, as the package ships them."""
        self.eval()
        mean, std = embedding_statistics(self.vision, self.image_processor)
        models = {TEXT: self.text, VISION: self.vision}
        write_weights(f"{directory}/clip.safetensors", models, **{MEAN: mean, STD: std})


def draw_anywhere(content, draws, name: str):
    """A picture of `content` at a place and of a size that `draws` gives under `name`."""
    radius = draws.uniform(f"{name}_radius", *RADIUS)
    x, y = (draws.uniform(f"{name}_{axis}", MARGIN + radius, 1 - MARGIN - radius) for axis in "xy")
    return Image.fromarray(draw(Scene(content, "plain", x, y, radius), IMAGE_SIZE))


def unit(embeddings):
    """[B, D] -> [B, D] of length 1."""
    return embeddings / embeddings.square().sum(-1, keepdim=True).sqrt()


@paddle.no_grad()
def embedding_statistics(vision, image_processor) -> tuple:
    """Mean and deviation of the embeddings of pictures, [1, D] each."""
    rows = ShapesDataset(0, MEASURED_PICTURES, looks=("plain",))
    pixels = image_processor([rows[index]["image"] for index in range(len(rows))], return_tensors="np").pixel_values
    embeddings = vision(paddle.to_tensor(pixels))[0].numpy()
    return embeddings.mean(0, keepdims=True), embeddings.std(0, keepdims=True)


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    launch_training_task(CLIPTrainingModule(args), recipe.build_shapes(args, looks=("plain",)), args)


if __name__ == "__main__":
    main()
