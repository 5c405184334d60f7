"""SDXL's job from the encoded cache and online, and the packs of the cache alone.

    python benchmarks/encoded_cache.py [jobs] [fill] [read] [bytes]

* jobs: samples per second from the cache and online in turns, and peak memory with 1000 and 10000 samples.
* fill: encoding and writing against encoding alone, with the toy's encoders, the fastest there are.
* read: entries per second at random with two threads, of the toy's size, from 10^3 and 10^6 entries.
* bytes: size of a sample of SDXL and SD3 under bf16, and GB/s at random with two threads.

Prints one line per figure. Takes some minutes, and 2 GB below the folder for temporary files.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ppdiffusers_train.data.pack_writer import PackWriter
from ppdiffusers_train.data.packs import Packs

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "sdxl" / "train_text_to_image_sdxl.py"
COUNTS, PAIRS, STEPS = (1000, 10000), 3, 100
FILLED, FILL_PAIRS = 20, 40
READ_COUNTS, READ_TURNS = (1000, 1_000_000), 5
REAL_COUNT = 600
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


def jobs(root: Path) -> None:
    """Runs from the cache and online."""
    from ppdiffusers_train.toy.models.sdxl import build_sdxl

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
        count: [*common, f"--train_data_dir={data[count]}", f"--output_dir={root / f'out{count}'}"] for count in COUNTS
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


def key(number: int) -> bytes:
    """A key as those of the cache: nothing in it is sorted."""
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def fill(root: Path) -> None:
    """Seconds and processor seconds per sample with and without a writer, in turns."""
    sys.path.insert(0, str(SCRIPT.parent))
    import paddle
    import train_text_to_image_sdxl as script

    from ppdiffusers_train.draws import RowDraws
    from ppdiffusers_train.module import encode_alone
    from ppdiffusers_train.toy.models.sdxl import build_sdxl

    flags = [f"--pretrained_model_name_or_path={build_sdxl(root / 'sdxl')}", "--resolution=64", "--train_data_dir=x"]
    module = script.SDXLTrainingModule(script.build_parser().parse_args(flags))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, [64, 64, 3], dtype=np.uint8))

    def encode(numbers, add):
        began = time.monotonic(), time.process_time()
        for number in numbers:
            arrays = module.preprocess({"image": image, "caption": f"noise {number}"}, RowDraws(0, number))
            batch = {name: paddle.to_tensor(array[None]) for name, array in arrays.items()}
            add(key(number), {name: tensor[0].numpy() for name, tensor in encode_alone(module, batch).items()})
        return time.monotonic() - began[0], time.process_time() - began[1]

    took = {"alone": [], "filling": []}
    encode(range(FILLED), lambda *_: None)  # warm
    with PackWriter(root / "packs") as writer:
        for turn in range(FILL_PAIRS):
            numbers = range(turn * FILLED, (turn + 1) * FILLED)
            ways = {"alone": lambda *_: None, "filling": writer.add}
            for name in sorted(ways, reverse=turn % 2):
                took[name].append(encode(numbers, ways[name]))
    alone, filling = np.array(took["alone"]), np.array(took["filling"])
    wall, processor = np.median(alone / filling, axis=0)
    print(f"encoders alone: {FILLED / np.median(alone, axis=0)[0]:.0f} samples/s")
    print(f"filling: {wall:.3f} of that, {processor:.3f} by processor time (medians of {FILL_PAIRS} pairs)")


def write_entries(folder: Path, count: int, sample) -> None:
    """Fill a folder with `sample(number)`, and say how large it is."""
    began = time.monotonic(), time.process_time()
    with PackWriter(folder) as writer:
        for number in range(count):
            writer.add(key(number), sample(number))
    seconds, processor = time.monotonic() - began[0], time.process_time() - began[1]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{count} entries: {size / count:.0f} bytes each, {len(list(folder.iterdir()))} files, written at "
        f"{count / seconds:.0f}/s ({1e6 * processor / count:.0f} us of a processor each)",
        flush=True,
    )


def read_entries(packs: Packs, count: int, times: int) -> tuple:
    """(entries per second, bytes per second, processor seconds per entry) at random with two threads."""
    keys = [key(number) for number in np.random.default_rng(1).integers(0, count, times).tolist()]

    def read(part):
        return sum(array.nbytes for name in part for array in packs.read(name).values())

    began = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        size = sum(pool.map(read, (keys[::2], keys[1::2])))
    seconds, processor = time.monotonic() - began[0], time.process_time() - began[1]
    return times / seconds, size / seconds, processor / times


def read(root: Path) -> None:
    """The toy's size, from few and from many."""
    noise = np.random.default_rng(0)
    latents, caption = noise.standard_normal([4, 8, 8], np.float32), noise.standard_normal([8, 32], np.float32)

    def sample(number):
        """Four images have the same caption, however many there are."""
        changed, embeds = latents.copy(), caption.copy()
        changed.flat[0], embeds.flat[0] = number, number // 4
        return {"latents": changed, "prompt_embeds": embeds, "time_ids": np.full([6], number, "f4")}

    opened = {}
    for count in READ_COUNTS:
        write_entries(root / str(count), count, sample)
        began = time.monotonic()
        opened[count] = Packs(root / str(count))
        print(f"{count} entries: opened in {time.monotonic() - began:.2f} s", flush=True)
        read_entries(opened[count], count, 50_000)  # into the page cache
    rates = []
    for _ in range(READ_TURNS):
        rates.append([read_entries(opened[count], count, 50_000) for count in READ_COUNTS])
    for count, (rate, _, processor) in zip(READ_COUNTS, np.median(rates, axis=0)):
        print(f"{count} entries: {rate:.0f} reads/s, {1e6 * processor:.1f} us of a processor each")


def real_bytes(root: Path) -> None:
    """Samples of real size under bf16: captions in 16 bits, latents and sizes in float32."""
    shapes = {
        "SDXL at 512": {"latents": [4, 64, 64], "prompt_embeds": [77, 2048], "pooled": [1280], "time_ids": [6]},
        "SDXL at 1024": {"latents": [4, 128, 128], "prompt_embeds": [77, 2048], "pooled": [1280], "time_ids": [6]},
        "SD3 at 512": {"latents": [16, 64, 64], "prompt_embeds": [154, 4096], "pooled": [2048]},
    }
    noise = np.random.default_rng(0).integers(0, 1 << 16, 1 << 22, dtype=np.uint16)
    for name, parts in shapes.items():

        def sample(number, parts=parts):
            kinds = {part: np.float32 if part in ("latents", "time_ids") else np.uint16 for part in parts}
            found = {}
            for part, shape in parts.items():
                length = math.prod(shape) * np.dtype(kinds[part]).itemsize // 2
                found[part] = noise[2 * number : 2 * number + length].view(kinds[part]).reshape(shape)
            return found

        print(name, end=", ")
        folder = root / name.replace(" ", "-")
        write_entries(folder, REAL_COUNT, sample)
        packs = Packs(folder)
        found = [read_entries(packs, REAL_COUNT, 1000) for _ in range(READ_TURNS)]
        rate, size, processor = np.median(found, axis=0)
        work = size / rate / processor
        print(
            f"{name}: {rate:.0f} reads/s, {size / 1e9:.2f} GB/s, {work / 1e9:.2f} GB a second of a processor",
            flush=True,
        )
        shutil.rmtree(folder)


def main():
    parts = {"jobs": jobs, "fill": fill, "read": read, "bytes": real_bytes}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as root:
            parts[name](Path(root))


if __name__ == "__main__":
    main()
