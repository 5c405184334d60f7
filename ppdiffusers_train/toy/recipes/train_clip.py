"""Train the shapes' CLIP; its weights are shipped as `weights/clip.safetensors`.

    python -m ppdiffusers_train.toy.recipes.train_clip

The loss is contrastive: in a batch, each caption, English or Chinese, must match its pictures, and each picture its
captions (Radford et al. 2021, arXiv 2103.00020, section 2.3). In a random batch, few pictures differ only in shape, so
colours are learned soon and shapes are not. So pictures come in fours, one of each shape in the same colours.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import math
import tempfile
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from PIL import Image

from ppdiffusers_train.job import job_main
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.models.weights import FILES, load_in_place
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.tensor_files import write_tensors
from ppdiffusers_train.toy.models.clip import IMAGE_SIZE, build_image_processor
from ppdiffusers_train.toy.models.shipped import load_weights, write_weights
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from ppdiffusers_train.toy.models.towers import (
    MEAN,
    STD,
    TEXT,
    VISION,
    build_text_tower,
    build_vision_tower,
)
from ppdiffusers_train.toy.recipes import recipe
from ppdiffusers_train.toy.world.judge import parse_caption
from ppdiffusers_train.toy.world.shapes import (
    CONTENTS,
    LOOKS,
    MARGIN,
    RADIUS,
    SHAPES,
    WORDINGS,
    Scene,
    caption,
    is_held_out,
    render,
)
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset
from ppdiffusers_train.toy.world.words import name_look, vocabulary

FIRST_LOGIT_SCALE, MAX_LOGIT_SCALE = 1 / 0.07, 100.0  # the paper's
NAMED_LOOKS = 0.5  # share of captions that name the look
MEASURED_PICTURES = 2000


def build_parser():
    return recipe.build_parser(
        __doc__.splitlines()[0],
        "outputs/clip",
        train_batch_size=16,
        learning_rate=2e-3,
        adam_beta2=0.98,  # the paper's, for transformers of pictures
        max_train_steps=3000,
    )


class CLIPTrainingModule(DiffusionTrainingModule):
    """Trains a text tower, a vision tower and the temperature of their similarities."""

    def __init__(self, args):
        super().__init__()
        self.encode_batch_size = args.train_batch_size
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = build_tokenizer(folder, vocabulary())
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
        """A picture of each shape in the row's colours, each with a caption: input_ids [4, 77], pixel_values
        [4, 3, 32, 32], `content` and `look` [4] of the picture, and `named_look` [4] of the caption, or -1."""
        content = parse_caption(row["caption"])
        contents = [content._replace(shape=shape) for shape in SHAPES]
        # A held-out combination is replaced by one more picture of the row's own content.
        contents = [content if is_held_out(one) else one for one in contents]
        pictures = [random_picture(one, draws, f"picture_{number}") for number, one in enumerate(contents)]
        images, captions, looks, named = zip(*pictures)
        return {
            "input_ids": np.stack([tokenize(self.tokenizer, caption)[0] for caption in captions]),
            "pixel_values": self.image_processor(list(images), return_tensors="np").pixel_values,
            "content": np.array([CONTENTS.index(one) for one in contents]),
            "look": np.array(looks),
            "named_look": np.array(named),
        }

    def encode(self, batch):
        """Nothing is frozen: the batch itself."""
        return batch

    def forward(self, encoded, draws):
        """Cross entropy of the matching, in both directions. Several pictures or captions may fit equally well."""
        encoded = {name: array.flatten(0, 1) for name, array in encoded.items()}
        input_ids, named = encoded["input_ids"], encoded["named_look"].unsqueeze(1)
        # Attention is causal: nothing after the first end token affects the caption's embedding.
        ends = (input_ids == self.tokenizer.eos_token_id).astype("int64").argmax(1)
        texts = unit(self.text(input_ids[:, : int(ends.max()) + 1])[0])
        pictures = unit(self.vision(encoded["pixel_values"])[0])
        fits = (encoded["content"].unsqueeze(1) == encoded["content"]) & ((named == encoded["look"]) | (named == -1))
        similarities = self.log_scale.clip(max=math.log(MAX_LOGIT_SCALE)).exp() * texts @ pictures.T
        return (match_loss(similarities, fits) + match_loss(similarities.T, fits.T)) / 2

    def save_weights(self, directory):
        folder = Path(directory) / "clip"
        folder.mkdir()
        write_tensors(folder / FILES["ppdiffusers"], self.state_dict(), {})

    def load_weights(self, directory):
        load_in_place(self, f"{directory}/clip")

    def save_pretrained(self, directory):
        """Write the towers, and the mean and deviation of the world's image embeddings, as the package ships them."""
        self.eval()
        mean, std = embedding_statistics(self.vision, self.image_processor)
        models = {TEXT: self.text, VISION: self.vision}
        write_weights(f"{directory}/clip.safetensors", models, **{MEAN: mean, STD: std})


def random_picture(content, draws, name: str) -> tuple:
    """(random picture of `content`, caption, index of its look, index of the look that the caption names or -1)."""
    scene = random_scene(content, draws, name)
    look = LOOKS.index(scene.look)
    wordings = WORDINGS[list(WORDINGS)[draws.integers(f"{name}_language", 0, len(WORDINGS))]]
    text = caption(content, wordings[draws.integers(f"{name}_wording", 0, len(wordings))])
    named = draws.bernoulli(f"{name}_names_look", NAMED_LOOKS)
    image = Image.fromarray(render(scene, IMAGE_SIZE))
    return image, name_look(text, scene.look) if named else text, look, look if named else -1


def random_scene(content, draws, name: str) -> Scene:
    """`content` at a random place, in a random size and look."""
    radius = draws.uniform(f"{name}_radius", *RADIUS)
    x, y = (draws.uniform(f"{name}_{axis}", MARGIN + radius, 1 - MARGIN - radius) for axis in "xy")
    return Scene(content, LOOKS[draws.integers(f"{name}_look", 0, len(LOOKS))], x, y, radius)


def match_loss(similarities, fits):
    """Mean cross entropy of each row's softmax against equal shares of all matches: [N, M], bool [N, M] -> scalar."""
    shares = fits.astype("float32")
    return nn.functional.cross_entropy(similarities, shares / shares.sum(1, keepdim=True), soft_label=True)


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


main = job_main(build_parser, CLIPTrainingModule, recipe.build_shapes)

if __name__ == "__main__":
    main()
