"""SDXL's job from the encoded cache and online: samples per second in turns, and peak memory with 1000 and 10000.

    python benchmarks/encoded_cache.py

Prints one line per figure. Takes some minutes, most of which encode.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "sdxl" / "train_text_to_image_sdxl.py"
COUNTS, PAIRS, STEPS = (1000, 10000), 3, 100
RUN = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def make_images(folder: Path, count: int) -> Path:
    """A folder of `count` small images of noise with captions."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    rows = []
    for index in range(count):
        Image.fromarray(noise.integers(0, 255, [64, 64, 3], dtype=np.uint8)).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"noise number {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(flags: list) -> tuple:
    """(samples per second, peak MB) of a run in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RUN, SCRIPT, *flags], capture_output=True, text=True, check=True)
    rate = float(re.findall(r"([\d.]+) samples/s", done.stderr)[-1])
    return rate, int(re.search(r"^peak (\d+)", done.stdout, re.M)[1]) / 1024


def main():
    from ppdiffusers_train.toy.models.sdxl import build_sdxl

    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        model = build_sdxl(root / "sdxl")
        common = [f"--pretrained_model_name_or_path={model}", "--resolution=64", f"--max_train_steps={STEPS}"]
        common += [
            "--train_batch_size=4",
            "--seed=0",
            "--report_to=none",
            "--overwrite_output_dir",
            f"--cache_dir={root / 'downloads'}",
        ]
        data = {count: make_images(root / str(count), count) for count in COUNTS}
        flags = {
            count: [*common, f"--train_data_dir={data[count]}", f"--output_dir={root / f'out{count}'}"]
            for count in COUNTS
        }
        for count in COUNTS:
            run(flags[count])  # encodes
        ratios = []
        for _ in range(PAIRS):
            cached, _ = run(flags[COUNTS[0]])
            online, memory = run([*flags[COUNTS[0]], "--no_encoded_cache"])
            ratios.append(cached / online)
            print(f"cached {cached:.1f}, online {online:.1f} samples/s: {ratios[-1]:.2f} times", flush=True)
        print(f"median {statistics.median(ratios):.2f} times; online {memory:.0f} MB at its peak")
        for count in COUNTS:
            print(f"{count} cached samples: {run(flags[count])[1]:.0f} MB at the peak", flush=True)


if __name__ == "__main__":
    main()
