"""Train the shapes' CLIP; its weights are shipped as `weights/clip.safetensors`.

    python -m ppdiffusers_train.toy.train_clip

Both towers learn from pairs of a picture and its caption alone, English or Chinese: in a batch, each caption has to
find its picture and each picture its caption (Radford et al. 2021, arXiv 2103.00020, section 2.3).
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import math
import tempfile
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors.paddle import save_file

from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.models.weights import WEIGHTS_FILE, load_in_place
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.toy import recipe
from ppdiffusers_train.toy.judge import parse_caption
from ppdiffusers_train.toy.shapes import CONTENTS
from ppdiffusers_train.toy.shapes_dataset import ShapesDataset
from ppdiffusers_train.toy.shipped import write_weights
from ppdiffusers_train.toy.tokenizer import build_tokenizer
from ppdiffusers_train.toy.towers import (
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
        max_train_steps=900,
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
        self.log_scale = self.create_parameter(
            [1], default_initializer=nn.initializer.Constant(math.log(FIRST_LOGIT_SCALE))
        )

    def preprocess(self, row, draws):
        """pixel_values [3, 32, 32], input_ids [77], and the number of what is shown, `content`."""
        return {
            "pixel_values": self.image_processor(row["image"], return_tensors="np").pixel_values[0],
            "input_ids": tokenize(self.tokenizer, row["caption"])[0],
            "content": np.int64(CONTENTS.index(parse_caption(row["caption"]))),
        }

    def encode(self, batch):
        """Nothing is frozen: the batch itself."""
        return batch

    def forward(self, encoded, draws):
        """Cross entropy of finding the pictures of captions, and the captions of pictures, within the batch."""
        input_ids, content = encoded["input_ids"], encoded["content"]
        # Attention is causal: nothing behind the first end token has a part in the caption's embedding.
        ends = (input_ids == self.tokenizer.eos_token_id).astype("int64").argmax(1)
        texts = unit(self.text(input_ids[:, : int(ends.max()) + 1])[0])
        pictures = unit(self.vision(encoded["pixel_values"])[0])
        scale = self.log_scale.clip(max=math.log(MAX_LOGIT_SCALE)).exp()
        own = paddle.eye(len(content))
        # Another pair of the same content is no wrong answer.
        same_content = (content[:, None] == content[None]).astype("float32")
        logits = scale * texts @ pictures.T - 1e4 * (same_content - own)
        answers = paddle.arange(len(content))
        cross_entropy = nn.functional.cross_entropy
        return (cross_entropy(logits, answers) + cross_entropy(logits.T, answers)) / 2

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


def unit(embeddings):
    """[B, D] -> [B, D] of length 1."""
    return embeddings / embeddings.square().sum(-1, keepdim=True).sqrt()


@paddle.no_grad()
def embedding_statistics(vision, image_processor) -> tuple:
    """Mean and deviation of the embeddings of pictures of all looks, [1, D] each."""
    rows = ShapesDataset(0, MEASURED_PICTURES)
    pixels = image_processor([rows[index]["image"] for index in range(len(rows))], return_tensors="np").pixel_values
    embeddings = vision(paddle.to_tensor(pixels))[0].numpy()
    return embeddings.mean(0, keepdims=True), embeddings.std(0, keepdims=True)


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    launch_training_task(CLIPTrainingModule(args), recipe.build_shapes(args), args)


if __name__ == "__main__":
    main()
