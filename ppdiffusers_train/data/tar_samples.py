"""Samples in the WebDataset format: the files of a tar archive whose names are the same up to the first dot.

    000017.jpg  000017.txt  000017.json  000018.png  000018.txt  …

Files of one sample are consecutive. Archives are not trusted: whatever is broken in one becomes a sample with a
problem, named and counted like an image that cannot be read, and nothing is ever unpacked to disk. So does a picture
that would be lost because of its name: `photo.v2.jpg` belongs to the sample `photo`, as in the library WebDataset.
"""

import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath

from ppdiffusers_train.data.metadata import without_doubles

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")  # the preferred one first
OTHER_IMAGES = ("jfif", "bmp", "gif", "tif", "tiff", "ppm", "jp2", "avif", "heic", "heif")
PICTURES = (*IMAGE_EXTENSIONS, *OTHER_IMAGES)
CAPTION_EXTENSIONS = ("txt", "text", "caption")
TEXT_EXTENSIONS = (*CAPTION_EXTENSIONS, "json")
LARGEST_TEXT = 1 << 20  # bytes
NO_MASK = "it has no mask; expected a file such as 000017.mask.png beside 000017.jpg"
CONSECUTIVE = (
    "the files of a sample must follow each other in the archive, as in one that `ppdiffusers-train pack` or "
    "`tar --sort=name` writes"
)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


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
    mask_offset: int = 0  # of the bytes of its mask, `mask.png`, which is not used unless it is asked for
    mask_size: int = 0
    mask: bytes = b""  # of a sequential archive
    others: list = field(default_factory=list)  # names of more pictures in the sample, which are not used


@dataclass
class Member:
    """A file in an archive: `a/photo.v2.jpg` has the key `a/photo`, the word `v2` and the extension `jpg`."""

    name: str
    key: str
    word: str  # between the first and the last dot; mostly empty
    extension: str
    offset: int
    size: int
    content: bytes
    problem: str  # why its content cannot be used


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
        yield _damaged(f"it is no tar archive: {error}" if sequential else _no_archive(file, error))
        return
    seen, damage = {}, []  # seen: whether the sample of a key lacked its caption
    for key, group in groupby(_members(archive, sequential, damage), lambda member: member.key):
        members = list(group)
        for sample in _samples(key, members, seen, caption_field):
            if not (damage and sample.problem):  # else the sample is incomplete
                yield sample
        seen[key] = seen.get(key, False) or not _texts(members)
    if not damage and has_more(archive.fileobj):
        damage.append(_damaged("data follow its end; expected a file for each archive"))
    yield from damage
    if not seen and not damage:
        yield _damaged("it holds no samples")


def _damaged(problem: str) -> TarSample:
    """The placeholder of a whole archive, or of the rest of it."""
    return TarSample("the archive", problem=problem, of_archive=True)


def _no_archive(file, error) -> str:
    """What a file is that is no tar archive."""
    file.seek(0)
    head = file.read(8)
    found = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)
    return f"it is compressed ({found}); expected a plain tar archive" if found else f"it is no tar archive: {error}"


def _members(archive, sequential: bool, damage: list):
    """Yield the files of an archive that can belong to samples. An error that ends it early is added to `damage`."""
    size = None if sequential else archive.fileobj.seek(0, os.SEEK_END)
    member, last = archive.next(), "its beginning"
    while member is not None:
        try:
            end = member.offset_data + member.size
            if size is not None and end > size and not member.issparse():
                raise tarfile.ReadError("unexpected end of data")
            if found := _member(archive, member, sequential):
                yield found
            last = member.name
            # Not `archive.next`: it treats a damaged header as the end, and keeps all members in memory.
            archive.fileobj.seek(archive.offset)
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # the zeros that end every archive
            return
        except (tarfile.TarError, EOFError, zlib.error) as error:
            damage.append(_damaged(f"it is cut short or damaged after {last}: {error}"))
            return


def has_more(file) -> bool:
    """Whether anything but zeros follows the end of an archive, as in a file of several archives."""
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return True
    return False


def _member(archive, member, sequential: bool):
    """A file of an archive, or None for what belongs to no sample."""
    path = PurePosixPath(member.name)
    stem, _, ending = path.name.partition(".")
    # Not a hidden file, a file without extension, or metadata of the format.
    if member.isdir() or not stem or not ending or stem.startswith("__"):
        return None
    word, _, extension = ending.lower().rpartition(".")
    problem, content = "", b""
    if member.issym() or member.islnk():
        target = readable(member.linkname)
        problem = f"it is a link to {target}, not a file; expected an archive of `tar -h --hard-dereference`"
    elif not member.isreg():
        problem = "it is no file, but a device or pipe"
    elif member.issparse():
        problem = "it is a sparse file; expected an archive of `tar` without `--sparse`"
    elif (extension in TEXT_EXTENSIONS and member.size <= LARGEST_TEXT) or (sequential and extension in PICTURES):
        content = archive.extractfile(member).read()
    key = str(path.with_name(stem))
    return Member(readable(member.name), key, word, extension, member.offset_data, member.size, content, problem)


def readable(name: str) -> str:
    """A name in which bytes that are not UTF-8 are written as `\\xff`."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _texts(members: list) -> list:
    return [member for member in members if member.extension in TEXT_EXTENSIONS]


def _samples(key: str, members: list, seen: dict, caption_field: str):
    """Yield the sample of `members`, and one with a problem for each picture that would be lost because of its name.

    Args:
        seen: {key of an earlier sample: whether it had no text}.
    """
    plain, named = [[m for m in members if bool(m.word) == has_word] for has_word in (False, True)]
    lost, others, masks = [], [], []
    with_text = {member.word for member in _texts(named)}
    has_image = any(member.extension in PICTURES for member in plain)
    for member in named:
        if member.extension in PICTURES:
            # The picture `mask.png` of a sample is another thing than a picture with a text or number of its own.
            is_part = has_image and member.word.isalpha() and member.word not in with_text
            (masks if is_part and member.word == "mask" else others if is_part else lost).append(member)
    if has_image or not lost:
        sample = _sample(key, plain or members, key in seen, caption_field)
        sample.others += [member.name for member in [*masks[1:], *others]]
        for mask in masks[:1]:
            sample.mask_offset, sample.mask_size, sample.mask = mask.offset, mask.size, mask.content
        if not (seen.get(key) and not has_image):  # the texts of an image that has been counted
            yield sample
    for member in lost:
        file = f"the file {member.word}.{member.extension} of the sample {readable(key)}"
        problem = f"the name of a sample ends at its first dot, so this is {file}; expected a name without other dots"
        yield TarSample(member.name, problem=problem)


def _sample(key: str, members: list, seen: bool, caption_field: str) -> TarSample:
    """The sample of `members`, with its first problem."""
    files = {member.extension: member for member in reversed(members)}
    image, *others = [files[extension] for extension in PICTURES if extension in files] or [None]
    sample = TarSample((image or members[0]).name, others=[member.name for member in others])
    names = ", ".join(member.name for member in members)
    if ".." in PurePosixPath(key).parts or key.startswith("/"):
        sample.problem = "its name points outside the archive"
    elif seen:
        sample.problem = f"there was a sample of this name before; {CONSECUTIVE}"
    elif len(files) < len(members):
        sample.problem = f"a file is there twice: {names}"
    elif image is None:
        sample.problem = f"it has no image, only {names}; expected a .{', .'.join(PICTURES)} beside it; {CONSECUTIVE}"
    elif image.problem:
        sample.problem = image.problem
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
        raise ValueError(f"it has no caption, only .{', .'.join(files)}; expected {expected} beside it; {CONSECUTIVE}")
    if found.problem:
        raise ValueError(f"{found.name}: {found.problem}")
    if found.size > LARGEST_TEXT:
        raise ValueError(f"{found.name} has {found.size:,} bytes; expected a caption")
    try:
        text = found.content.decode("utf-8-sig")
        content = (
            json.loads(text, object_pairs_hook=without_doubles)
            if found.extension == "json"
            else {caption_field: text.strip()}
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{found.name} cannot be read: {error}") from error
    if not isinstance(content, dict) or caption_field not in content:
        fields = f"the fields {', '.join(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{found.name} has no {caption_field!r}, but {fields}; --caption_column names the field")
    captions = content[caption_field]
    captions = captions if isinstance(captions, list) else [captions]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{found.name} has {captions!r} for {caption_field!r}; expected a text or several")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{found.name} holds half of a surrogate pair; expected valid Unicode") from error
    return captions
