"""How long a step waits for a checkpoint, beside the time of a plain copy of the same bytes to the same disk.

    python benchmarks/checkpoint.py

A checkpoint of a full run holds weights, two moments and, with `--use_ema`, the average twice: 3 to 5 numbers per
parameter, synced to the disk. The plain write of as many bytes, synced, is what no format can beat.
"""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import training

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ppdiffusers_train.toy.models.kandinsky2_2 import build_kandinsky

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples" / "kandinsky2_2"))
import train_text_to_image_decoder as job  # noqa: E402


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def plain_write_seconds(file: Path, size: int) -> float:
    """Time to write so many bytes and sync them."""
    block = os.urandom(1 << 24)
    start = time.perf_counter()
    with open(file, "wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--width", type=int, default=256, help="channels of the UNet's first level; the next has twice")
    own = parser.parse_args(argv)
    saves = []
    write = training.write_checkpoint

    def timed(*arguments, **options):
        start = time.perf_counter()
        write(*arguments, **options)
        saves.append(time.perf_counter() - start)

    training.write_checkpoint = timed
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prior, decoder = build_kandinsky(folder / "base", channels=(own.width, 2 * own.width))
        job.main(
            [
                f"--pretrained_prior_model_name_or_path={prior}",
                f"--pretrained_decoder_model_name_or_path={decoder}",
                f"--train_data_dir={ROOT / 'examples' / 'data' / 'photos'}",
                f"--encoded_cache_dir={folder / 'cache'}",
                f"--output_dir={folder / 'out'}",
                f"--max_train_steps={own.saves}",
                *["--resolution=64", "--train_batch_size=1", "--seed=0", "--report_to=none", "--use_ema"],
                *["--checkpointing_steps=1", "--checkpoints_total_limit=1"],
            ]
        )
        size = folder_bytes(folder / "out" / f"checkpoint-{own.saves}")
        plain = statistics.median(plain_write_seconds(folder / "plain", size) for _ in range(3))
    seconds = statistics.median(saves)
    print(
        f"checkpoints of {size / 1e6:.0f} MB: a step waits {seconds:.2f} s, {size / seconds / 1e6:.0f} MB/s; a plain "
        f"write of as much takes {plain:.2f} s: {seconds / plain:.2f} times"
    )


if __name__ == "__main__":
    main()
