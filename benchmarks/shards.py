"""Loading from tar shards against Pillow alone, and what it costs a stream to find its place again.

    python benchmarks/shards.py

Prints one line per figure; takes about a minute. On one core: reading, decoding, resizing and cropping the samples of
shards, in turns with Pillow doing so with the same bytes in memory.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image
from webdataset import TarWriter

from ppdiffusers_train.data.shards import local_shards, open_shards
from ppdiffusers_train.data.streams import Stream
from ppdiffusers_train.data.transforms import fit
from ppdiffusers_train.draws import RowDraws

PHOTOS = Path(__file__).resolve().parent.parent / "examples" / "data" / "photos"
RESOLUTION, SHARDS, PER_SHARD, PAIRS = 256, 64, 125, 5
MEASURED = 600  # samples in each turn


def write_shards(folder: Path) -> list:
    """Shards that hold the photographs again and again; returns the photographs' bytes."""
    rows = [json.loads(line) for line in (PHOTOS / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [(PHOTOS / row["file_name"]).read_bytes() for row in rows]
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:02d}.tar"), mtime=0) as writer:
            for index in range(PER_SHARD):
                which = (shard * PER_SHARD + index) % len(rows)
                writer.write({"__key__": f"{index:06d}", "jpg": images[which], "txt": rows[which]["text"]})
    return images


def seconds(work) -> float:
    """Time that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def from_memory(images: list) -> None:
    """What Pillow needs for it."""
    for index in range(MEASURED):
        image = Image.open(io.BytesIO(images[index % len(images)])).convert("RGB")
        fit(image, RESOLUTION, RESOLUTION, RowDraws(0, index), "bilinear", True, False)


def from_shards(rows) -> None:
    """What a loader thread needs for it, in any order."""
    for index in range(MEASURED):
        image = rows[index * 7919 % len(rows)]["image"]
        fit(image, RESOLUTION, RESOLUTION, RowDraws(0, index), "bilinear", True, False)


def main():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        images = write_shards(folder)
        shards = local_shards([root])
        megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
        indexing = seconds(lambda: open_shards(shards, "text", folder))
        print(f"indexing {SHARDS * PER_SHARD} samples, {megabytes:.0f} MB: {indexing:.2f} s", flush=True)
        print(f"opening them with their indices: {seconds(lambda: open_shards(shards, 'text', folder)):.3f} s")
        rows, ratios = open_shards(shards, "text", folder), []
        for _ in range(PAIRS):
            alone, loaded = seconds(lambda: from_memory(images)), seconds(lambda: from_shards(rows))
            ratios.append(alone / loaded)
            print(
                f"Pillow {MEASURED / alone:.0f}, shards {MEASURED / loaded:.0f} samples/s: {ratios[-1]:.2f}", flush=True
            )
        print(f"median: {statistics.median(ratios):.2f} times Pillow's speed")

        addresses = [f"pipe:cat {shard}" for shard in shards]
        size, cache = SHARDS * PER_SHARD, folder / "cache"
        whole = Stream(addresses, size, 0, "text", cache)
        first = seconds(lambda: whole[0])
        rest = seconds(lambda: [whole.lanes[position % 8].sample(position // 8) for position in range(8, size)])
        print(f"a stream's first sample: {first:.2f} s; all {size} read: {rest:.2f} s")
        for position in (size // 4, size // 2, size - 100):
            known, unknown = (
                Stream(addresses, size, 0, "text", cache),
                Stream(addresses, size, 0, "text", folder / f"{position}"),
            )
            print(
                f"resumed at {position}: ready after {seconds(lambda s=known, p=position: ready(s, p)):.2f} s, "
                f"{seconds(lambda s=unknown, p=position: ready(s, p)):.2f} s where the samples were never counted",
                flush=True,
            )


def ready(stream, position: int) -> None:
    """Ask each lane for a sample."""
    for offset in range(8):
        stream[position + offset]


if __name__ == "__main__":
    main()
