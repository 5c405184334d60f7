"""How fast `ppdiffusers-train check` is beside bare decoding, with one process and with two.

    python benchmarks/check.py

Photographs of several sizes are decoded by Pillow alone, in as many processes, and then checked, in turns. It prints
the ratio of each pair of neighbours, and how much faster two processes are than one, bare and checking: single times
mean little on a shared machine. The start of processes is in the check's time and not in the bare decoding's.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "data" / "photos"
SIZES = (512, 768, 1024, 1536)  # pixels of the longer side
DECODE = """
import sys, time
from pathlib import Path
from PIL import Image
files = sorted(Path(sys.argv[1]).glob("*.jpg"))[int(sys.argv[2]) :: int(sys.argv[3])]
start = time.perf_counter()
for file in files:
    with Image.open(file) as image:
        image.load()
print(time.perf_counter() - start)
"""


def make_folder(folder: Path, count: int) -> Path:
    """A folder of `count` photographs, no two alike, with captions."""
    folder.mkdir()
    photos, noise, rows = sorted(PHOTOS.glob("*.jpg")), np.random.default_rng(0), []
    for index in range(count):
        with Image.open(photos[index % len(photos)]) as photo:
            size = SIZES[index // len(photos) % len(SIZES)]
            scale = size / max(photo.size)
            pixels = np.asarray(photo.convert("RGB").resize([round(side * scale) for side in photo.size]), np.float32)
        pixels = np.clip(pixels + noise.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)  # as a camera's is
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=92)
        rows.append({"file_name": f"{index:05d}.jpg", "text": f"photograph {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def decode(folder: Path, processes: int) -> float:
    """Seconds until Pillow has decoded all images of a folder, in so many processes."""
    commands = [[sys.executable, "-c", DECODE, str(folder), str(part), str(processes)] for part in range(processes)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    return max(float(process.communicate()[0]) for process in running)


def check(folder: Path, processes: int) -> float:
    """Seconds that a check of the folder takes."""
    command = [sys.executable, "-m", "ppdiffusers_train.cli", "check", str(folder), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder.parent)}
    done = subprocess.run(
        [*command, f"--processes={processes}"], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["seconds"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="photographs in the folder")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each kind")
    args = parser.parse_args(argv)
    ratios, gains = {1: [], 2: []}, {"bare": [], "check": []}
    with tempfile.TemporaryDirectory() as root:
        folder = make_folder(Path(root) / "photos", args.images)
        check(folder, 1)  # prepares the table, and has the files in memory
        for _ in range(args.turns):
            bare, checked = {}, {}
            for processes, found in ratios.items():
                bare[processes], checked[processes] = decode(folder, processes), check(folder, processes)
                found.append(bare[processes] / checked[processes])
                print(
                    f"{processes} processes: bare {args.images / bare[processes]:.0f} images/s, check "
                    f"{args.images / checked[processes]:.0f} images/s: {found[-1]:.2f} times as fast",
                    flush=True,
                )
            gains["bare"].append(bare[1] / bare[2])
            gains["check"].append(checked[1] / checked[2])
    for processes, found in ratios.items():
        print(f"{processes} processes: median {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    for name, found in gains.items():
        print(f"two instead of one, {name}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
