"""Pipelines of the published size and layout whose weights are made up, as diffusers writes them.

    python benchmarks/true_size_models.py FOLDER NAME [--dtype float16] [--tiny]

A process of its own, because it needs torch: diffusers and transformers say, without allocating anything, which
tensors a model of `configurations/NAME.json` has. Each is drawn and written by itself: no more than one is held.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import argparse
import json
import math
import struct
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from ppdiffusers_train.toy.models.tokenizer import END, START, build_tokenizer

CONFIGURATIONS = Path(__file__).parent / "configurations"
POOL = 2**24  # normal numbers that are drawn; a tensor takes some of them, again and again
LIBRARIES = {"ppdiffusers": "diffusers", "ppdiffusers.transformers": "transformers", None: None}
CONFIG_FILES = {"scheduler": "scheduler_config.json", "image_processor": "preprocessor_config.json"}
FIRST_TOKEN, LAST_TOKEN = 49406, 49407  # of a caption, in CLIP's vocabulary
CODES = {"float32": "F32", "float16": "F16"}
# What is no width and no depth stays in a tiny model.
WIDTHS = {
    "hidden_size", "intermediate_size", "projection_dim", "cross_attention_dim", "joint_attention_dim", "embedding_dim",
    "caption_projection_dim", "pooled_projection_dim", "encoder_hid_dim", "addition_time_embed_dim",
    "projection_class_embeddings_input_dim", "num_vq_embeddings", "block_out_channels",
}  # fmt: skip
DEPTHS = {"num_layers", "num_hidden_layers", "layers_per_block", "transformer_layers_per_block"}


def write_pipeline(folder: Path, name: str, dtype: str, is_tiny: bool) -> dict:
    """Write the pipeline of `configurations/<name>.json`, and return {model: how many parameters it has}."""
    parts = json.loads((CONFIGURATIONS / f"{name}.json").read_text(encoding="utf-8"))
    index = parts.pop("model_index")
    classes = {part: value for part, value in index.items() if isinstance(value, list)}
    for part, (library, class_name) in classes.items():
        index[part] = [LIBRARIES[library], class_name]
    write_json(folder / "model_index.json", index)
    counts = {}
    for part, config in parts.items():
        if is_tiny:
            config = shrink(config)
        write_json(folder / part / CONFIG_FILES.get(part, "config.json"), config)
        if part not in CONFIG_FILES:
            model = describe(*index[part], config)
            counts[part] = sum(parameter.numel() for parameter in model.parameters())
            write_weights(folder / part / file_of(model), model, dtype)
    for part in index:
        if part.startswith("tokenizer") and index[part][0]:
            write_tokenizer(folder / part)
    return counts


def shrink(config: dict) -> dict:
    """A configuration an eighth as wide and of hardly any depth, with all that a published one has."""
    # The norm of MoVQ has 32 groups whatever its configuration says.
    divisor = 4 if config.get("_class_name") == "VQModel" else 8

    def changed(name, value):
        if isinstance(value, list) and name in WIDTHS | DEPTHS:
            return [changed(name, number) for number in value]
        if name in WIDTHS or (name, value) == ("attention_head_dim", 64):  # else it is how many heads there are
            return value // divisor
        return min(value, 1) if name in DEPTHS else value

    small = {name: changed(name, value) for name, value in config.items()}
    return {**small, "norm_num_groups": 8} if "block_out_channels" in config and divisor == 8 else small


def describe(library: str, class_name: str, config: dict):
    """A model without storage."""
    with torch.device("meta"):
        if library == "diffusers":
            return getattr(diffusers, class_name).from_config(config)
        part_class = getattr(transformers, class_name)
        return part_class(part_class.config_class(**config))


def file_of(model) -> str:
    """Name of the file that a model's library keeps weights in."""
    is_diffusers = isinstance(model, diffusers.ModelMixin)
    return "diffusion_pytorch_model.safetensors" if is_diffusers else "model.safetensors"


def write_weights(file: Path, model, dtype: str) -> None:
    """A safetensors file with a value for all that `model` has, drawn one tensor at a time."""
    tensors, end, header = model.state_dict(), 0, {"__metadata__": {"format": "pt"}}
    itemsize = np.dtype(dtype).itemsize
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(0)
    pool = draw.standard_normal(POOL, np.float32)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            numbers = np.resize(pool[draw.integers(POOL // 2) :], tuple(tensor.shape))
            stream.write(scaled(name, numbers).astype(dtype).data)


def scaled(name: str, numbers: np.ndarray) -> np.ndarray:
    """Sane weights: what scales is near one, what is added small, and a layer keeps the size of what comes in."""
    shape = numbers.shape
    is_scale = name == "clip_std" or (name.endswith("weight") and len(shape) == 1)
    if is_scale:
        return 1 + np.float32(0.1) * numbers
    inputs = math.prod(shape[1:]) if len(shape) > 1 and "embedding" not in name else 2500
    return numbers * np.float32(min(0.02, inputs**-0.5))


def write_tokenizer(folder: Path) -> None:
    """The toys' tokenizer, with the first and last token where CLIP's vocabulary has them."""
    build_tokenizer(folder)
    file = folder / "vocab.json"
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {**vocabulary, START: FIRST_TOKEN, END: LAST_TOKEN})


def write_json(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help="of a file in benchmarks/configurations")
    parser.add_argument("--dtype", choices=tuple(CODES), default="float32", help="of the weights on disk")
    parser.add_argument("--tiny", action="store_true", help="an eighth of the width, and no depth")
    args = parser.parse_args()
    print(json.dumps(write_pipeline(args.folder, args.name, args.dtype, args.tiny)))


if __name__ == "__main__":
    main()
