"""What the loop adds to a training step: its steps against bare ones of the same decoder, in turns in one process.

    python benchmarks/loop.py

A bare step is forward, backward, AdamW and clear_grad on one encoded batch in memory. A step of the loop also loads the
encoded batch, clips, looks for numbers that are none, follows the learning rate and reports to VisualDL.

Expected: the loop reads every gradient once for its norm and, when it clips, writes it once. AdamW reads four numbers
per parameter and writes three, and both are small beside forward and backward. So below 2 %.
"""

import ppdiffusers_train  # noqa: F401

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import paddle

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.loader import PreprocessedSamples, iterate_batches
from ppdiffusers_train.data.order import SampleOrder
from ppdiffusers_train.draws import Draws
from ppdiffusers_train.module import encode_batch
from ppdiffusers_train.toy.models.kandinsky2_2 import build_kandinsky
from ppdiffusers_train.training import check_run, launch_training_task

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples" / "kandinsky2_2"))
import train_text_to_image_decoder as job  # noqa: E402

WARM_UP = 2


def loop_seconds(module, dataset, args, steps: int) -> float:
    """Median time of a step of the loop."""
    times = []
    module.after_step = lambda: times.append(time.perf_counter())
    launch_training_task(module, dataset, args)
    return median_difference(times[-steps:])


def bare_seconds(module, encoded, steps: int) -> float:
    """Median time of a bare step."""
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=module.trainable_parameters())
    times = []
    for step in range(WARM_UP + steps):
        module(encoded, Draws(0, range(step, step + len(encoded["latents"])))).backward()
        optimizer.step()
        optimizer.clear_grad()
        times.append(time.perf_counter())
    return median_difference(times[-steps:])


def median_difference(times: list) -> float:
    """The median of the differences of neighbours."""
    return statistics.median(later - earlier for earlier, later in zip(times, times[1:]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="steps of each half of a pair")
    parser.add_argument("--width", type=int, default=96, help="channels of the UNet's first level")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--report_to", default="visualdl")
    own = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prior, decoder = build_kandinsky(folder / "base", channels=(own.width, 2 * own.width))
        args = job.build_parser().parse_args(
            [
                f"--pretrained_prior_model_name_or_path={prior}",
                f"--pretrained_decoder_model_name_or_path={decoder}",
                f"--train_data_dir={ROOT / 'examples' / 'data' / 'photos'}",
                f"--encoded_cache_dir={folder / 'cache'}",
                f"--output_dir={folder / 'out'}",
                f"--resolution={own.resolution}",
                f"--max_train_steps={WARM_UP + own.steps}",
                f"--report_to={own.report_to}",
                *["--train_batch_size=4", "--seed=0"],
            ]
        )
        check_run(args)
        dataset = build_dataset(args)
        module = job.KandinskyDecoderTrainingModule(args)
        samples = PreprocessedSamples(dataset, module.preprocess, SampleOrder(0, len(dataset)))
        batch, _ = next(iterate_batches(samples, [[0, 1, 2, 3]], 0))
        encoded = encode_batch(module, batch)
        ratios = []
        for pair in range(own.pairs):
            halves = [
                lambda: loop_seconds(job.KandinskyDecoderTrainingModule(args), dataset, args, own.steps),
                lambda: bare_seconds(module, encoded, own.steps),
            ]
            times = {}
            for half in (0, 1) if pair % 2 else (1, 0):
                times[half] = halves[half]()
            ratios.append(times[0] / times[1])
            print(f"loop {times[0]:.3f} s, bare {times[1]:.3f} s a step: {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
