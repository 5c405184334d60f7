"""Packs a data set into tar shards in the WebDataset format. The output is deterministic and can be resumed.

`pack.json` in the output folder is the plan: the data, the size of shards, and which of them are complete. A shard is
written under a temporary name, synced, renamed, and then added to the plan.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ppdiffusers_train.data.inspection import Inspected
from ppdiffusers_train.data.pixels import VERSION, read
from ppdiffusers_train.data.rows import content_digest, read_stored, reading
from ppdiffusers_train.data.tar_samples import LARGEST_TEXT
from ppdiffusers_train.errors import BadSampleError, UserError, writing
from ppdiffusers_train.runtime.checkpoint import require_writable, sync, write_text
from ppdiffusers_train.tools.inspection import inspect_all
from ppdiffusers_train.tools.sources import Source

PLAN_FILE, FORMAT = "pack.json", 1
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # by Pillow's name of a format
# What an image loses when its pixels are stored as training sees them, by the kind of remark (`check.KINDS`).
LOSSES = {
    "deep": "scaled to 8 bits",
    "profile": "converted to sRGB",
    "bad_profile": "without their colour profile",
    "ink": "converted from CMYK to RGB",
    "frames": "only the first of several",
}
NO_SAMPLE_LOST = ("refused", "other_split", "other_picture")  # kinds of problems that leave out no sample
BLOCK, RECORD = 512, 10240  # bytes: a tar file consists of blocks, and ends with a full record


def pack(source: Source, output_dir, shard_size: int, name: str, caption_field: str, processes: int, log) -> dict:
    """Write the samples of a source into `<output_dir>/<name>-00000.tar` and so on. Unusable samples are left out.

    Images are stored as they are, byte for byte, under the extension of their format. Those of other formats than JPEG,
    PNG and WebP become PNG files of the pixels that training sees, with their transparency.

    Args:
        shard_size: largest size of a shard, in bytes, unless a single sample is larger.
        caption_field: field of a .json that holds the captions.
        processes: number of processes that decode images, to find those that cannot be read.
        log: called with each line to print.
    Returns:
        The plan. `shards` is a list of {"name", "samples", "bytes", "left_out", "next_row"}; `left_out` lists the
        problems of samples that belong to no shard.
    Raises:
        UserError: the folder holds other files.
        WriteError: a shard cannot be written.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name: {name!r} is not a valid beginning of a file name; expected a word such as photos")
    folder, rows = Path(output_dir), source.rows
    require_writable(folder, "OUTPUT_DIR")
    wanted = {
        "format": FORMAT,
        "pixels": VERSION,
        "data": digest(rows),
        "shard_size": shard_size,
        "name": name,
        "caption_field": caption_field,
    }
    plan = read_plan(folder, wanted)
    plan["left_out"] = [text for kind, text in source.problems if kind not in NO_SAMPLE_LOST]
    for text in plan["left_out"]:
        log(f"left out: {text}")
    with writing("OUTPUT_DIR: shards", folder, "the same command resumes"):
        write_plan(folder, plan)
        if plan["shards"]:
            log(f"{len(plan['shards'])} shards are complete, up to row {next_row(plan)} of {len(rows)}")
        if next_row(plan) < len(rows):
            write_shards(rows, folder, plan, processes, log)
            write_plan(folder, plan)
    return plan


def summary(plan: dict) -> dict:
    """The result of a plan: the shards' names, the number of samples and bytes, and all that was left out."""
    left_out = [text for part in (plan, *plan["shards"]) for text in part["left_out"]]
    samples, size = (sum(shard[name] for shard in plan["shards"]) for name in ("samples", "bytes"))
    return {"shards": [s["name"] for s in plan["shards"]], "samples": samples, "bytes": size, "left_out": left_out}


def digest(rows) -> str:
    """A hash of all captions and of the image files' names, sizes and modification times."""
    total = hashlib.blake2b(digest_size=16)
    for index in tqdm(range(len(rows)), desc="reading the list", unit="sample", delay=5):
        try:
            captions, stamp = rows.captions(index), file_stamp(rows.location(index))
        except (BadSampleError, OSError):
            captions = stamp = None
        total.update(json.dumps([stamp, captions]).encode())
    return total.hexdigest()


def file_stamp(location) -> list:
    """What identifies an image without reading its file. For images in memory, a hash."""
    if isinstance(location, bytes):
        return [content_digest(location).hex()]
    path, *part = location if isinstance(location, tuple) else [location]
    stat = os.stat(path)
    return [os.path.basename(path), stat.st_size, stat.st_mtime_ns, *part]


def read_plan(folder: Path, wanted: dict) -> dict:
    """The plan in a folder, with the shards that are complete, or a new plan.

    Raises:
        UserError: it differs from `wanted`, or there are shards and no plan.
    """
    file = folder / PLAN_FILE
    new = {**wanted, "shards": [], "left_out": []}
    if not file.exists():
        if found := next(folder.glob("*.tar"), None):
            raise UserError(f"OUTPUT_DIR: {found} is there, but no {PLAN_FILE}; expected an empty folder")
        return new
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in wanted if plan.get(name) != wanted[name]]
        shards = plan["shards"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"OUTPUT_DIR: {file} cannot be read ({error}); expected an empty folder") from error
    if different:
        flags = {"shard_size": "--shard_size", "name": "--name", "caption_field": "--caption_column"}
        what = ", ".join(flags.get(name, name) for name in different)
        raise UserError(f"OUTPUT_DIR: {file} is the plan of other shards (other: {what}); expected an empty folder")
    return {**new, "shards": list(itertools.takewhile(partial(is_complete, folder), shards))}


def is_complete(folder: Path, shard: dict) -> bool:
    """Whether a shard of a plan is in the folder with its full size."""
    file = folder / shard["name"]
    return file.is_file() and file.stat().st_size == shard["bytes"]


def next_row(plan: dict) -> int:
    """The first row that is in no complete shard."""
    return plan["shards"][-1]["next_row"] if plan["shards"] else 0


def write_plan(folder: Path, plan: dict) -> None:
    """Write the plan to disk atomically."""
    write_text(folder / PLAN_FILE, json.dumps(plan, indent=1, ensure_ascii=False) + "\n")


def write_shards(rows, folder: Path, plan: dict, processes: int, log) -> None:
    """Write the missing shards of a plan, and add each to it when it is complete."""
    start, digits = next_row(plan), max(6, len(str(len(rows))))
    shard, left_out, converted = None, [], {""}

    def finish(next_row: int) -> None:
        note = {"name": shard.name, "samples": shard.samples, "bytes": shard.finish()}
        plan["shards"].append({**note, "left_out": left_out[:], "next_row": next_row})
        left_out.clear()
        write_plan(folder, plan)

    with tqdm(total=len(rows), initial=start, desc="packing", unit="sample") as progress:
        try:
            for (index, captions, problem), image in inspect_all(candidates(rows, start), processes):
                progress.update()
                try:
                    if problem:
                        raise BadSampleError(problem)
                    files = sample_files(rows, index, image, captions, plan["caption_field"])
                except BadSampleError as error:
                    left_out.append(str(error))
                    log(f"left out: {error}")
                    continue
                change = conversion(image)
                if change not in converted:
                    converted.add(change)
                    log(f"{change}; the first: {rows.name(index)}")
                if shard and shard.size_with(files) > plan["shard_size"]:
                    finish(index)
                    shard = None
                shard = shard or Shard(folder, f"{plan['name']}-{len(plan['shards']):05d}.tar")
                shard.add(f"{index:0{digits}d}", files)
            if shard:
                finish(len(rows))
                shard = None
        finally:
            if shard:
                shard.abandon()
    plan["left_out"] += left_out  # where there is no shard at all


def conversion(image: Inspected) -> str:
    """What becomes of a stored image that is not kept as it is; empty for one that is."""
    if image.format in EXTENSIONS:
        return ""
    changes = [LOSSES[kind] for kind in image.remarks_by_kind() if kind in LOSSES]
    return f"{image.format} images become PNG, {', '.join(changes) or 'without loss'}"


def candidates(rows, start: int):
    """Yield ((index, captions, problem), location of the image) of the rows from `start` on."""
    for index in range(start, len(rows)):
        try:
            yield (index, rows.captions(index), ""), rows.location(index)
        except BadSampleError as error:
            yield (index, [], str(error)), b""


def sample_files(rows, index: int, image: Inspected, captions: list, caption_field: str) -> dict:
    """The files of a sample in a shard: {extension: content}.

    Raises:
        BadSampleError: training could not use it.
    """
    name = rows.name(index)
    with reading(name):
        if image.problem:
            raise ValueError(image.problem)
        content = read_stored(rows.location(index))
        if image.format not in EXTENSIONS:
            file = io.BytesIO()
            read(content)[0].save(file, "PNG")
            content = file.getvalue()
    extension, text = caption_file(captions, caption_field)
    if len(text) > LARGEST_TEXT:
        raise BadSampleError(f"{name}: {len(text):,} bytes of captions; shards have room for {LARGEST_TEXT:,}")
    return {EXTENSIONS.get(image.format, "png"): content, extension: text}


def caption_file(captions: list, caption_field: str) -> tuple:
    """Extension and content of the file with a sample's captions: .txt, or .json where .txt would change them."""
    if len(captions) == 1 and captions[0] == captions[0].strip() and not captions[0].startswith("\ufeff"):
        return "txt", captions[0].encode("utf-8")
    return "json", json.dumps({caption_field: captions}).encode("ascii")


class Shard:
    """A tar file that is being written."""

    def __init__(self, folder: Path, name: str):
        from webdataset import TarWriter  # only here: it takes a while to import

        self.folder, self.name, self.samples, self.blocks = folder, name, 0, 0
        self.temporary = folder / f".{name}.part"  # not a name of a shard
        self.file = open(self.temporary, "wb")
        self.writer = TarWriter(self.file, user="", group="", mode=0o644, encoder=False, mtime=0)

    def size_with(self, files: dict) -> int:
        """Size of the finished tar file, in bytes, if these files were added."""
        size = (self.blocks + blocks_of(files) + 2) * BLOCK  # two empty ones end it
        return -(-size // RECORD) * RECORD

    def add(self, key: str, files: dict) -> None:
        """Write a sample."""
        self.writer.write({"__key__": key, **files})
        self.samples += 1
        self.blocks += blocks_of(files)

    def finish(self) -> int:
        """Sync the file and give it its final name. Returns its size in bytes."""
        self.writer.close()
        self.file.close()
        sync(self.temporary)
        os.replace(self.temporary, self.folder / self.name)
        sync(self.folder)
        return (self.folder / self.name).stat().st_size

    def abandon(self) -> None:
        """Delete the unfinished file."""
        with contextlib.suppress(OSError):  # the disk may be full
            self.writer.close()
        with contextlib.suppress(OSError):
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def blocks_of(files: dict) -> int:
    """Number of blocks that files take in a tar: a header each, and their content."""
    return sum(1 + -(-len(content) // BLOCK) for content in files.values())
