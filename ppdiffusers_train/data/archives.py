"""Folders with zip archives are read as if the archives had been unpacked where they are.

They are unpacked in a cache folder, once; nothing is written beside the data. The result is a folder of links to the
unpacked files, and to the other files of the folder.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import posixpath
import secrets
import shutil
import zipfile
import zlib
from pathlib import Path

from ppdiffusers_train.data.folder_files import walk
from ppdiffusers_train.data.rows import stamp_of
from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.reporting.status_line import print_on_main

ARCHIVE = ".zip"
UTF8_FLAG = 0x800  # of a file in an archive


def is_archive(name: str) -> bool:
    """Whether a file is a zip archive, by its extension."""
    return name.lower().endswith(ARCHIVE)


def unpacked(folder: str, index_dir: Path) -> str:
    """A folder with the files of `folder`, in which archives are replaced by their files.

    Raises:
        UserError: an archive cannot be used, two files have one name, or the cache cannot be written.
    """
    files = list(walk(folder))
    stamps = {name: stamp_of(os.stat(os.path.join(folder, name))).hex() for name in files if is_archive(name)}
    identity = (os.path.realpath(folder), files, stamps)
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    place = index_dir / "unpacked"
    target = place / digest / os.path.basename(identity[0])
    if target.is_dir():
        return str(target)
    print_on_main(f"{folder}: {len(stamps)} zip archives are unpacked into {place}; the first is {next(iter(stamps))}")
    with writing("--index_dir: unpacked archives", place, kind=UserError):
        for name, stamp in stamps.items():
            make_once(place / stamp, functools.partial(unpack, os.path.join(folder, name)))
        contents = {name: place / stamp for name, stamp in stamps.items()}
        make_once(target, functools.partial(link_files, folder, files, contents))
    return str(target)


def make_once(target: Path, fill) -> None:
    """Make a folder, if there is none, by `fill(new folder)`. It appears under its name only when complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # where files cannot be locked, each process makes a folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return
        new = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            new.mkdir()
            fill(new)
            with contextlib.suppress(FileExistsError):
                new.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def unpack(archive: str, target: Path) -> None:
    """Write the files of an archive into a folder.

    Raises:
        UserError: it is damaged or encrypted, or a file would be outside of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                member.filename = member_name(member)
                if member.filename.startswith("/") or ".." in member.filename.split("/"):
                    raise UserError(f"{archive}: the name {member.filename!r} points outside the archive")
            opened.extractall(target, members)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise UserError(f"{archive}: it cannot be unpacked: {error}") from error


def member_name(member: zipfile.ZipInfo) -> str:
    """The path of a file in an archive. Some programs write `\\`, or do not say that names are UTF-8 or GB 18030."""
    name = member.filename.replace("\\", "/")
    if not name.isascii() and not member.flag_bits & UTF8_FLAG:
        for encoding in ("utf-8", "gb18030"):
            with contextlib.suppress(UnicodeDecodeError):
                return name.encode("cp437").decode(encoding)  # what `zipfile` takes all other names for
    return name


def link_files(folder: str, names: list, contents: dict, target: Path) -> None:
    """Fill `target` with links to the files of a folder and of its archives.

    Args:
        names: of the folder's files.
        contents: {name of an archive: folder with its files}.
    Raises:
        UserError: two files have one name.
    """
    links = {name: (name, os.path.join(os.path.realpath(folder), name)) for name in names if name not in contents}
    for archive, content in contents.items():
        for inner in walk(str(content)):
            name = posixpath.join(posixpath.dirname(archive), inner)
            if is_archive(name):
                raise UserError(f"{archive}: it holds another archive, {inner}; unpack it")
            if name in links:
                raise UserError(f"{folder}: {name} is in {archive} and in {links[name][0]}; expected one of them")
            links[name] = (archive, os.path.join(str(content), inner))
    for name, (_, path) in links.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(os.path.abspath(path))
