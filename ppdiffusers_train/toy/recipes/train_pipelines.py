"""Train the denoising models of the pipelines of shapes, with the scripts for the published ones.

    python -m ppdiffusers_train.toy.recipes.train_pipelines decoder

Each starts from random weights with the shipped encoders; its result is shipped as `weights/decoder.safetensors` and so
on. Pipelines with text encoders of their own train on pictures in all looks. A caption names the look unless it is
plain, so a caption without one means a plain shape, and fine-tuning can make another look the default. Kandinsky's
prior is trained on plain shapes. Its decoder is trained on all looks and then, from there, without the outlined one,
which embeddings do not encode: fine-tuning brings it back. The decoder trains on images alone, so half of its pictures
are in colours that no caption names, always in all looks.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import sys
from pathlib import Path

from ppdiffusers import PriorTransformer, SD3Transformer2DModel, UNet2DConditionModel

from ppdiffusers_train.arguments.parser import ArgumentParser
from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.toy.demo.jobs import Job
from ppdiffusers_train.toy.demo.running import train, write_pretrained
from ppdiffusers_train.toy.models.shipped import load_weights, write_weights
from ppdiffusers_train.toy.world.looks import LOOKS
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset
from ppdiffusers_train.toy.world.shapes_folder import write_shapes_folder

COMMON = ("--encoded_cache", "--proportion_empty_prompts=0.1", "--lr_scheduler=cosine", "--lr_warmup_steps=100")


def _training(script: str, steps: int, batch_size: int = 16, learning_rate: float = 2e-3) -> Job:
    length = (f"--max_train_steps={steps}", f"--train_batch_size={batch_size}", f"--learning_rate={learning_rate}")
    return Job(script, (*COMMON, *length), sampling={}, kind="pipeline", look="plain")


TRAININGS = {
    "prior": _training("kandinsky2_2/train_text_to_image_prior.py", 6000, batch_size=32),
    "decoder_of_all_looks": _training("kandinsky2_2/train_text_to_image_decoder.py", 12000),
    "decoder": _training("kandinsky2_2/train_text_to_image_decoder.py", 1500, learning_rate=1e-3),
    "sd": _training("stable_diffusion/train_text_to_image.py", 12000),
    "sdxl": _training("sdxl/train_text_to_image_sdxl.py", 9000),
    "sd3": _training("sd3/train_text_to_image_sd3.py", 12000),
}
SEEN_LOOKS = {
    "prior": ("plain",),
    "decoder_of_all_looks": LOOKS,
    "decoder": ("plain", "striped"),
}
SEEN_NAMELESS = {"decoder_of_all_looks": LOOKS, "decoder": LOOKS}
ALL_LOOKS = ("plain", "outlined", "plain", "striped")
PICTURES = 6000  # in colours with names
PARTS = {"prior": ("prior", PriorTransformer), "sd3": ("transformer", SD3Transformer2DModel)}  # all others train a UNet


def build_parser():
    parser = ArgumentParser(config=False, description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=TRAININGS, help="Model to train.")
    parser.add_argument("--start_from", metavar="FILE", help="File of weights of another run to start from.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the pictures and of the training.")
    parser.add_argument(
        "--output_dir", default="outputs/toys", metavar="DIR", help="Folder for NAME.safetensors and the run."
    )
    return parser


@one_line_errors
def main(argv=None):
    own, more = build_parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    output, job = Path(own.output_dir), TRAININGS[own.name]
    data, result = output / f"{own.name}_pictures", output / own.name
    if not data.exists():
        looks, nameless = SEEN_LOOKS.get(own.name, ALL_LOOKS), SEEN_NAMELESS.get(own.name, ())
        count = 2 * PICTURES if nameless else PICTURES
        pictures = ShapesDataset(own.seed, count, looks=looks, name_looks=True, nameless_looks=nameless)
        write_shapes_folder(data, pictures)
    part, model_class = PARTS.get(own.name, ("unet", UNet2DConditionModel))
    base = write_pretrained(job, output / f"{own.name}_start", trained=False)
    if own.start_from:
        folder = next(folder for folder in base.values() if Path(folder, part).is_dir())
        load_weights(model_class.from_pretrained(f"{folder}/{part}"), own.start_from).save_pretrained(
            f"{folder}/{part}"
        )
    train(job, base, data, result, f"--seed={own.seed}", *more)
    write_weights(output / f"{own.name}.safetensors", {"": model_class.from_pretrained(str(result / part))})


if __name__ == "__main__":
    main()
