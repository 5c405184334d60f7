"""Train what draws in the pipelines of shapes, with the scripts that train the published ones.

    python -m ppdiffusers_train.toy.recipes.train_pipelines decoder

Each begins at random weights between the encoders that are shipped, and its result is shipped, too, as
`weights/decoder.safetensors` and so on. Those with text encoders of their own see pictures in every look; a caption
names the look unless it is plain, so that a caption without one means a plain shape, and another look by default is
something to be fine-tuned on. Kandinsky's prior learns to ask for plain shapes. Its decoder learns all looks, and then,
going on from there, without the outlined one, which no embedding tells: what is left is what fine-tuning brings back.
It learns from images alone, so half of its pictures are in colours that no caption names: in all looks, to the end.
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
    "sd": _training("your_own_job/train_text_to_image_sd.py", 12000),
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
PICTURES = 6000  # with names
PARTS = {"prior": ("prior", PriorTransformer), "sd3": ("transformer", SD3Transformer2DModel)}  # of all others the UNet


def build_parser():
    parser = ArgumentParser(config=False, description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=TRAININGS, help="what to train")
    parser.add_argument("--start_from", metavar="FILE", help="weights of another run, to go on from")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and of the training")
    parser.add_argument("--output_dir", default="outputs/toys", metavar="DIR", help="gets NAME.safetensors, and more")
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
