"""Problems of a data set, and what training would do about them, found without training."""

import math
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ppdiffusers_train.data.image_index import Decoded
from ppdiffusers_train.data.inspection import Inspected
from ppdiffusers_train.data.pixels import EXTREME
from ppdiffusers_train.data.streams import LANES
from ppdiffusers_train.errors import BadSampleError, one_line
from ppdiffusers_train.tools.caption_length import LONGEST, fewest_tokens
from ppdiffusers_train.tools.inspection import inspect_all
from ppdiffusers_train.tools.sources import SHARDS, Source

SHOWN = 3  # texts of each kind of finding in the printed report


@dataclass(frozen=True)
class Kind:
    """A kind of finding, and how a run treats it. An error stops the run or loses samples; other kinds are remarks."""

    title: str
    training: str
    error: bool = True


SKIPPED = "stops at the first; --max_bad_samples N skips up to N"
REFUSED = "does not start, whatever --max_bad_samples"
LEFT_OUT = "leaves them out, and prints how many"
KINDS = {
    "refused": Kind("the data cannot be loaded", REFUSED),
    "no_samples": Kind("there are no samples", REFUSED),
    "bad_metadata": Kind("rows of metadata that cannot be read", REFUSED),
    "lost_row": Kind("rows of metadata without an image", LEFT_OUT),
    "bad_sample": Kind("samples in shards that cannot be used", SKIPPED),
    "bad_caption": Kind("captions that are missing or no text", SKIPPED),
    "unreadable": Kind("images that cannot be read", SKIPPED),
    "bomb": Kind("images too large to be opened", SKIPPED),
    "other_split": Kind("images in folders other than train/", "does not use them", error=False),
    "other_picture": Kind("more pictures of samples in shards", "uses the first of each sample", error=False),
    "empty_caption": Kind("empty captions", "uses them as they are", error=False),
    "long_caption": Kind("captions of more than {longest} tokens", "truncates them after {longest}", error=False),
    "small": Kind("images with a side below {resolution} pixels", "enlarges them", error=False),
    "large": Kind("images of more than {pixels:,} pixels", "uses them; each takes time and memory", error=False),
    "transparent": Kind("images with transparent pixels", "puts them on --background_color", error=False),
    "deep": Kind("images of more than 8 bits per channel", "scales them to 8 bits", error=False),
    "profile": Kind("images in a colour space other than sRGB", "converts them to sRGB", error=False),
    "bad_profile": Kind("images with a colour profile that cannot be used", "ignores the profile", error=False),
    "ink": Kind("CMYK images without a colour profile", "converts them by a formula, not exactly", error=False),
    "frames": Kind("files of several images (animation, pages)", "uses the first one", error=False),
    "long": Kind("images more than {extreme} times as long as wide", "enlarges and crops a part", error=False),
    "duplicate": Kind("copies of other images", "uses each copy", error=False),
}


@dataclass
class Tokens:
    """How captions are measured: `count(caption)` is the number of tokens; `note` states how exact that is."""

    count: object = fewest_tokens
    longest: int = LONGEST
    note: str = (
        "tokens: counted as words and punctuation, a lower bound, so more captions may be too long; --tokenizer DIR "
        "counts them exactly"
    )


class Findings:
    """The findings: how many of each kind, and the first texts of each kind.

    Args:
        rows: the rows that are checked.
        kept: how many texts of each kind to keep; None for all.
    """

    def __init__(self, rows, kept):
        self.rows, self.kept = rows, kept
        self.counts, self.texts = dict.fromkeys(KINDS, 0), {kind: [] for kind in KINDS}

    def add(self, kind: str, text: str) -> None:
        """Add a finding with its text."""
        self.counts[kind] += 1
        if self._keeps(kind):
            self.texts[kind].append(text)

    def add_row(self, kind: str, index: int, text: str) -> None:
        """Add a finding about row `index`."""
        self.add(kind, f"{self.rows.name(index)}: {text}" if self._keeps(kind) else "")

    def _keeps(self, kind: str) -> bool:
        return self.kept is None or len(self.texts[kind]) < self.kept

    def listed(self, **settings) -> list:
        """A dictionary for each kind that was found, errors first.

        Args:
            settings: values of the placeholders in the texts of `KINDS`.
        """
        return [
            {
                "kind": name,
                "error": kind.error,
                "count": self.counts[name],
                "title": kind.title.format(**settings),
                "training": kind.training.format(**settings),
                "texts": self.texts[name],
            }
            for name, kind in KINDS.items()
            if self.counts[name]
        ]


@dataclass
class Report:
    """The result of a check."""

    source: str
    kind: str  # of the source
    samples: int
    captions: int
    sizes: dict  # {"smallest": (width, height), "median": …, "largest": …} by pixels; empty where nothing can be read
    findings: list  # see `Findings.listed`
    notes: list  # more lines
    seconds: float

    @property
    def status(self) -> int:
        """The exit status: 1 where an error was found."""
        return int(any(finding["error"] for finding in self.findings))

    def as_json(self) -> dict:
        """The report for programs."""
        return {**vars(self), "status": self.status}

    def as_text(self) -> str:
        """The report for people: a table and a summary line."""
        lines, column = [], max((len(finding["title"]) for finding in self.findings), default=0)
        for is_error, heading in ((True, "errors"), (False, "remarks")):
            found = [finding for finding in self.findings if finding["error"] == is_error]
            if found:
                lines.append(f"{heading:>8}  {'what':<{column}}  training")
            for finding in found:
                lines.append(f"{finding['count']:>8,}  {finding['title']:<{column}}  {finding['training']}")
                lines += [f"{'':12}{one_line(text)}" for text in finding["texts"][:SHOWN]]
                lines += [f"{'':12}…"] if finding["count"] > SHOWN else []
            lines += [""] if found else []
        sizes = ", ".join(f"{name} {width} x {height}" for name, (width, height) in self.sizes.items())
        return "\n".join(
            [
                *lines,
                *self.notes,
                f"{self.source}: {self.kind}, {self.samples:,} samples, {self.captions:,} captions; images: "
                f"{sizes or 'none that can be read'}; {self.seconds:.1f} s",
            ]
        )


def check(
    source: Source, name: str, resolution: int, tokens: Tokens, processes: int, index_dir: Path, kept=SHOWN
) -> Report:
    """Check all samples of a source. Every image is decoded in full, once: what is found goes into the index.

    Args:
        name: the source's name in the report.
        resolution: of training, in pixels; images with a shorter side are reported as remarks.
        processes: number of processes that decode images.
        index_dir: see `image_index.index_images`.
        kept: how many texts of each kind of finding to keep; None for all.
    Raises:
        RunError: a process was killed.
    """
    started, rows = time.monotonic(), source.rows
    findings, images, unreadable = Findings(rows, kept), Images(), []
    for kind, text in source.problems:
        findings.add(kind, text)
    if not len(rows):
        findings.add("no_samples", name)
    captions = CaptionCheck(source, tokens, findings)
    decoded = Decoded(rows, index_dir)
    with tqdm(total=len(rows), desc="checking", unit="image") as progress:
        for index, image in inspect_all(known_or_located(captions.locations(), decoded), processes):
            progress.update(index + 1 - progress.n)
            if not decoded.is_known[index]:
                decoded.add(index, image)
            if image.problem:
                unreadable.append(index)
                findings.add_row("bomb" if image.is_bomb else "unreadable", index, image.problem)
                continue
            images.add(index, image)
            if min(image.width, image.height) < resolution:
                findings.add_row("small", index, f"{image.width} x {image.height}")
            for kind, text in image.remarks_by_kind().items():
                findings.add_row(kind, index, text)
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                findings.add_row("large", index, f"{image.width} x {image.height}")
        progress.update(len(rows) - progress.n)
    decoded.write()
    for index, first in images.repeated():
        findings.add_row("duplicate", index, f"the same file as {rows.name(first)}")
    found = findings.listed(
        longest=tokens.longest, resolution=resolution, pixels=Image.MAX_IMAGE_PIXELS, extreme=EXTREME
    )
    notes = [note for note in (tokens.note, rows.summary(unreadable)) if note]
    seconds = round(time.monotonic() - started, 3)
    return Report(name, source.kind, len(rows), captions.count, images.sizes(), found, notes, seconds)


def known_or_located(items, decoded):
    """Each (row, location), with what is known of the image in place of its location if it was decoded earlier."""
    for row, location in items:
        yield row, decoded.known(row) if decoded.is_known[row] else location


class CaptionCheck:
    """Checks the captions of a source; `count` is the number of captions so far."""

    def __init__(self, source: Source, tokens: Tokens, findings: Findings):
        self.source, self.tokens, self.findings, self.count = source, tokens, findings, 0

    def locations(self):
        """Check each row's captions, and yield (index, location of the image) where it has one."""
        rows, is_shards = self.source.rows, self.source.kind == SHARDS
        for index in range(len(rows)):
            try:
                self._check(index, rows.captions(index))
            except BadSampleError as error:
                self.findings.add("bad_sample" if is_shards else "bad_caption", str(error))
                if is_shards:
                    continue
            try:
                location = rows.location(index)
            except BadSampleError as error:
                self.findings.add("unreadable", str(error))
                continue
            yield index, location

    def _check(self, index: int, captions: list) -> None:
        self.count += len(captions)
        for caption in captions:
            if not caption.strip():
                self.findings.add_row("empty_caption", index, repr(caption))
            elif (length := self.tokens.count(caption)) > self.tokens.longest:
                self.findings.add_row("long_caption", index, f"{length} tokens")


class Images:
    """Sizes and content hashes of the images that can be read, in some dozens of bytes each."""

    def __init__(self):
        self.rows, self.widths, self.heights, self.digests = array("q"), array("q"), array("q"), bytearray()

    def add(self, row: int, image: Inspected) -> None:
        """Remember the image of a row."""
        self.rows.append(row)
        self.widths.append(image.width)
        self.heights.append(image.height)
        self.digests += image.digest

    def sizes(self) -> dict:
        """(width, height) of the smallest, median and largest image by pixels; empty where there are none."""
        if not self.rows:
            return {}
        order = np.argsort(np.int64(self.widths) * np.int64(self.heights), kind="stable")
        places = {"smallest": 0, "median": len(order) // 2, "largest": -1}
        return {name: (self.widths[order[place]], self.heights[order[place]]) for name, place in places.items()}

    def repeated(self):
        """Yield (row, first row with the same content) of each repeated image."""
        digests = np.frombuffer(self.digests, dtype=[("high", "u8"), ("low", "u8")])
        _, first, group = np.unique(digests, return_index=True, return_inverse=True)
        for place in np.flatnonzero(first[group] != np.arange(len(digests))):
            yield self.rows[place], self.rows[first[group[place]]]


def describe_shards(shards: int, ranks: int, workers: int) -> str:
    """What the number of shards means for a run on `ranks` ranks with `workers` loading threads each."""
    lanes = min(LANES, shards)
    read = lanes // math.gcd(lanes, ranks)
    share = "all of them" if read == lanes else f"{read} of them"
    return (
        f"{shards} shards for {ranks} ranks x {workers} workers: as local files any number of shards works; as a "
        f"stream they are read in {lanes} lanes, of which each rank reads {share}, whatever its workers"
    )
