"""Samples in the WebDataset format: the files of a tar archive whose names differ only in their extension.

    000017.jpg  000017.txt  000017.json  000018.png  000018.txt  …

Files of one sample are consecutive. Archives are not trusted: whatever is broken in one becomes a sample with a
problem, named and counted like an image that cannot be read, and nothing is ever unpacked to disk.
"""

import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
CAPTION_EXTENSIONS = ("txt", "text", "caption")
TEXT_EXTENSIONS = (*CAPTION_EXTENSIONS, "json")
LARGEST_TEXT = 1 << 20  # bytes


@dataclass
class TarSample:
    """One sample of an archive, or the problem in its place."""

    name: str  # of its image in the archive
    offset: int = 0  # of the image's bytes
    size: int = 0
    captions: list = field(default_factory=list)
    problem: str = ""
    of_archive: bool = False  # whether the problem concerns the whole archive
    image: bytes = b""  # of a sequential archive


@dataclass
class Member:
    """A file in an archive."""

    name: str
    key: str
    extension: str
    offset: int
    size: int
    content: bytes


def read_samples(file, caption_field: str, sequential: bool):
    """Yield the `TarSample`s of an archive in their order.

    Args:
        file: opened for reading.
        caption_field: field of a sample's .json with its captions, where the sample has no text file.
        sequential: whether the file cannot seek; then images are read as well.
    """
    try:
        archive = tarfile.open(fileobj=file, mode="r|*" if sequential else "r:")  # reads the first header
    except (tarfile.TarError, EOFError) as error:
        yield _damaged(f"it is no tar archive: {error}")
        return
    seen, damage = set(), []
    for key, members in groupby(_members(archive, sequential, damage), lambda member: member.key):
        sample = _sample(key, list(members), key in seen, caption_field)
        if not (damage and sample.problem):  # else the sample is incomplete
            yield sample
        seen.add(key)
    yield from damage
    if not seen and not damage:
        yield _damaged("it holds no samples")


def _damaged(problem: str) -> TarSample:
    """The placeholder of a whole archive, or of the rest of it."""
    return TarSample("the archive", problem=problem, of_archive=True)


def _members(archive, sequential: bool, damage: list):
    """Yield the files of an archive that can belong to samples. An error that ends it early is added to `damage`."""
    size = None if sequential else archive.fileobj.seek(0, os.SEEK_END)
    member, last = archive.next(), "its beginning"
    while member is not None:
        try:
            end = member.offset_data + member.size
            if size is not None and end > size:
                raise tarfile.ReadError("unexpected end of data")
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            # Not a hidden file, a file without extension, or metadata of the format.
            if member.isreg() and stem and extension and not stem.startswith("__"):
                extension = extension.lower()
                text = extension in TEXT_EXTENSIONS and member.size <= LARGEST_TEXT
                wanted = text or (sequential and extension in IMAGE_EXTENSIONS)
                content = archive.extractfile(member).read() if wanted else b""
                key = str(path.with_name(stem))
                yield Member(member.name, key, extension, member.offset_data, member.size, content)
            last = member.name
            # Not `archive.next`: it treats a damaged header as the end, and keeps all members in memory.
            archive.fileobj.seek(archive.offset)
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # the zeros that end every archive
            return
        except (tarfile.TarError, EOFError, zlib.error) as error:
            damage.append(_damaged(f"it is cut short or damaged after {last}: {error}"))
            return


def _sample(key: str, members: list, seen: bool, caption_field: str) -> TarSample:
    """The sample of `members`, with its first problem."""
    files = {member.extension: member for member in reversed(members)}
    image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
    sample = TarSample((image or members[0]).name)
    names = ", ".join(member.name for member in members)
    if ".." in PurePosixPath(key).parts or key.startswith("/"):
        sample.problem = "its name points outside the archive"
    elif seen:
        sample.problem = "there was a sample of this name before"
    elif len(files) < len(members):
        sample.problem = f"a file is there twice: {names}"
    elif image is None:
        sample.problem = f"it has no image, only {names}; expected a .{', .'.join(IMAGE_EXTENSIONS)}"
    else:
        sample.offset, sample.size, sample.image = image.offset, image.size, image.content
        try:
            sample.captions = _captions(files, caption_field)
        except ValueError as error:
            sample.problem = str(error)
    return sample


def _captions(files: dict, caption_field: str) -> list:
    """The captions among the files of a sample, by extension.

    Raises:
        ValueError: there is none, or it is no text.
    """
    found = next((files[extension] for extension in TEXT_EXTENSIONS if extension in files), None)
    if found is None:
        expected = f"a .{', .'.join(CAPTION_EXTENSIONS)}, or a .json with {caption_field!r}"
        raise ValueError(f"it has no caption, only .{', .'.join(files)}; expected {expected}")
    if found.size > LARGEST_TEXT:
        raise ValueError(f"{found.name} has {found.size:,} bytes; expected a caption")
    try:
        text = found.content.decode("utf-8")
        captions = json.loads(text)[caption_field] if found.extension == "json" else text.strip()
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{found.name} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{found.name} has no {caption_field!r}") from error
    captions = captions if isinstance(captions, list) else [captions]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{found.name} has {captions!r} for {caption_field!r}; expected a text or several")
    return captions
