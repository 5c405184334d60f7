"""What a start costs with many images: time and memory for each image more than with 200, at the first start and later.

    python benchmarks/scale.py 10000 100000 1000000 --folder /tmp/scale

Each data set is made once: JPEGs of 8 x 8 pixels, 1000 to a folder, with captions of real length. Each start is a
process of its own, which lists the folder, looks at what the index does not know, and finds the order of epoch 3.
"""

import ppdiffusers_train  # noqa: F401

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

from PIL import Image

FEW = 200  # images of the start that others are compared with
CAPTION = "a photograph number {} of a harbour at dusk, with boats at the quay, warm light in the windows, soft clouds"
IN_A_FOLDER = 1000


def make_images(folder: Path, count: int) -> Path:
    """A folder of `count` images with a metadata.jsonl, unless it is there already."""
    if (folder / "metadata.jsonl").exists():
        return folder
    buffer = BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "JPEG")
    content, rows = buffer.getvalue(), []
    for number in range(count):
        name = f"{number // IN_A_FOLDER:04}/{number:07}.jpg"
        if number % IN_A_FOLDER == 0:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content + number.to_bytes(8, "little"))
        rows.append(json.dumps({"file_name": name, "text": CAPTION.format(number)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def read_and_hash(folder: Path) -> float:
    """Seconds that reading and hashing all files once takes."""
    from ppdiffusers_train.data.rows import content_digest, read_stored

    files = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    began = time.perf_counter()
    for file in files:
        content_digest(read_stored(file))
    return time.perf_counter() - began


def start(folder: str, index_dir: str) -> dict:
    """Figures of one start: seconds, opened images, peak memory in bytes, seconds of finding a row of epoch 3."""
    from ppdiffusers_train.arguments import add_data_arguments
    from ppdiffusers_train.data.dataset import build_dataset, index_folder
    from ppdiffusers_train.data.image_index import index_images
    from ppdiffusers_train.data.order import SampleOrder
    from ppdiffusers_train.runtime.distributed import Ranks

    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(["--train_data_dir", folder, "--index_dir", index_dir])
    args.seed, opened = 0, [0]

    def listen(event, arguments):
        opened[0] += event == "open" and str(arguments[0]).endswith(".jpg")

    sys.addaudithook(listen)
    before, began = peak(), time.perf_counter()
    rows = build_dataset(args)
    index_images(rows, Ranks(0, 1), index_folder(args))
    rows.digest(), rows.images_digest()
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    SampleOrder(0, len(rows)).row(int(2.5 * len(rows)))
    return {
        "seconds": seconds,
        "opened": opened[0],
        "bytes": peak() - before,
        "epoch 3": time.perf_counter() - began,
    }


def peak() -> int:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def started(folder: Path, index_dir: Path) -> dict:
    """The figures of `start` in a process of its own."""
    command = [sys.executable, __file__, "--start", str(folder), "--index_dir", str(index_dir)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, default=Path("outputs/scale"))
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--index_dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.index_dir)))
        return
    print("| images | first start, µs an image | without reading and hashing | second start | memory, bytes | opened |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = None
    for count in [FEW, *args.counts]:
        folder = make_images(args.folder / str(count), count)
        index = args.folder / f"index-{count}-{os.getpid()}"
        first, reading, second = started(folder, index), read_and_hash(folder), started(folder, index)
        base = base or (first, reading, second)
        more = [
            1e6 * (new["seconds"] - old["seconds"]) / count for new, old in zip((first, second), (base[0], base[2]))
        ]
        bytes_each = [(new["bytes"] - old["bytes"]) / count for new, old in zip((first, second), (base[0], base[2]))]
        bare = more[0] - 1e6 * (reading - base[1]) / count
        print(
            f"| {count:,} | {more[0]:.0f} | {bare:.0f} | {more[1]:.1f} | {bytes_each[0]:.0f}, {bytes_each[1]:.0f} | "
            f"{first['opened']:,}, {second['opened']} |  epoch 3 found in {second['epoch 3']:.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
