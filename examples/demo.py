"""Watch a Kandinsky 2.2 decoder learn: a tiny one, on a CPU, from photographs, in a few minutes.

    make demo

It builds the tiny pipelines, trains the decoder with the script that trains the real one, and writes a picture: the
photographs, what the untrained decoder draws from their CLIP embeddings, and what the trained one draws.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import runpy
import sys
from pathlib import Path

import numpy as np
import paddle
from ppdiffusers import KandinskyV22Pipeline, UNet2DConditionModel

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.reporting.images import captioned_grid
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.toy.kandinsky2_2 import build_kandinsky

EXAMPLES = Path(__file__).resolve().parent
PHOTOS = EXAMPLES / "data" / "photos"
RESOLUTION = 64


def main(argv=None):
    """Run the demo; `argv` is `[output folder, training steps]`, both optional."""
    argv = sys.argv[1:] if argv is None else argv
    output = Path(argv[0] if argv else "outputs/demo")
    steps = argv[1] if len(argv) > 1 else "800"
    quiet_libraries()
    print("1/3  building a tiny Kandinsky 2.2", flush=True)
    # Velocity, because what an embedding says is decided at high noise, where epsilon hardly depends on it: a decoder
    # from scratch would need much longer to learn it.
    prior, decoder = build_kandinsky(output / "pretrained", channels=(32, 64), prediction_type="v_prediction")

    print("2/3  training its decoder on the photographs in examples/data/photos, about 4 minutes", flush=True)
    script = EXAMPLES / "kandinsky2_2" / "train_text_to_image_decoder.py"
    job = runpy.run_path(str(script))
    flags = [
        f"--pretrained_decoder_model_name_or_path={decoder}",
        f"--pretrained_prior_model_name_or_path={prior}",
        f"--train_data_dir={PHOTOS}",
        f"--resolution={RESOLUTION}",
        "--train_batch_size=5",
        f"--max_train_steps={steps}",
        "--learning_rate=2e-3",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=20",
        "--checkpointing_steps=1000",
        "--seed=0",
        f"--encoded_cache_dir={output / 'encoded'}",
        f"--output_dir={output / 'trained'}",
    ]
    job["main"](flags)

    print("3/3  drawing every photograph from its CLIP embedding alone", flush=True)
    args = job["build_parser"]().parse_args(flags)
    module = job["KandinskyDecoderTrainingModule"](args)
    photographs, embeddings = photographs_and_embeddings(module, build_dataset(args))
    drawn = [
        draw_from_embeddings(
            UNet2DConditionModel.from_pretrained(str(folder / "unet")), module.movq, module.scheduler, embeddings
        )
        for folder in (decoder, output / "trained")
    ]
    picture = output / "demo.png"
    captioned_grid(
        [photographs, *drawn],
        ["photographs", "drawn by the untrained decoder", "drawn by the trained decoder"],
        scale=2,
    ).save(picture)
    print(
        f"\n{picture}: photographs, untrained, trained\n{output / 'trained'}: the pipeline, for "
        "KandinskyV22CombinedPipeline.from_pretrained\n\nNext, your own images (a folder with a metadata.jsonl):\n"
        f"  cd examples/kandinsky2_2 && python -u {script.name} --train_data_dir YOUR_FOLDER --resolution 512\n"
    )


def photographs_and_embeddings(module, dataset):
    """The photographs as MoVQ sees them (PIL images), and their CLIP embeddings [N, D]."""
    samples = [module.preprocess(dataset[index], RowDraws(0, index)) for index in range(len(dataset))]
    pixels = np.stack([sample["pixel_values"] for sample in samples])
    images = KandinskyV22Pipeline.numpy_to_pil((pixels.transpose(0, 2, 3, 1) + 1) / 2)
    with paddle.no_grad():
        encoded = module.encode(
            {name: paddle.to_tensor(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        )
    return images, encoded["image_embeds"]


def draw_from_embeddings(unet, movq, scheduler, image_embeds):
    """What a decoder draws from CLIP embeddings [N, D], without guidance, from the same noise every time."""
    pipeline = KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)
    pipeline.set_progress_bar_config(disable=True)
    paddle.seed(0)
    return pipeline(
        image_embeds=image_embeds,
        negative_image_embeds=paddle.zeros_like(image_embeds),
        guidance_scale=1.0,
        num_inference_steps=50,
        height=RESOLUTION,
        width=RESOLUTION,
    ).images


if __name__ == "__main__":
    main()
