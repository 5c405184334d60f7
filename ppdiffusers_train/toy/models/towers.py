"""The shapes' CLIP: two small towers, trained together to match captions and pictures (`train_clip.py`).

One text tower is used by all pipelines, with or without its projection, by its last hidden states or earlier ones.
"""

from ppdiffusers.transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from ppdiffusers_train.toy.models.clip import text_config, vision_config
from ppdiffusers_train.toy.models.shipped import FOLDER, load_array, load_weights

WEIGHTS = FOLDER / "clip.safetensors"
TEXT, VISION = "text.", "vision."  # the towers' prefixes in the file
MEAN, STD = "image_embeds_mean", "image_embeds_std"

EMBEDDING = 64  # of texts and pictures, and the towers' width


def build_text_tower(tokenizer, tower_class=CLIPTextModelWithProjection):
    """A text tower with random weights, for a tokenizer whose words are `words.vocabulary()`."""
    return tower_class(text_config(tokenizer, EMBEDDING, layers=2, heads=2))


def build_vision_tower() -> CLIPVisionModelWithProjection:
    """A vision tower with random weights."""
    return CLIPVisionModelWithProjection(vision_config(EMBEDDING, layers=2, heads=2, intermediate=4 * EMBEDDING))


def load_text_tower(tokenizer, tower_class=CLIPTextModelWithProjection, file=WEIGHTS):
    """The trained text tower; as a `CLIPTextModel`, without its projection."""
    return load_weights(build_text_tower(tokenizer, tower_class), file, TEXT)


def load_vision_tower(file=WEIGHTS) -> CLIPVisionModelWithProjection:
    """The trained vision tower."""
    return load_weights(build_vision_tower(), file, VISION)


def load_embedding_statistics() -> tuple:
    """Mean and deviation of the world's image embeddings, [1, EMBEDDING] each: a prior's clip_mean and clip_std."""
    return load_array(WEIGHTS, MEAN), load_array(WEIGHTS, STD)
