"""Tar shards for tests."""

import io
import tarfile

from PIL import Image


def picture(colour="red", size=(40, 30), format="PNG"):
    """The bytes of a picture."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


def write_tar(path, files):
    """A tar archive of `[(name, bytes)]`."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pair(key, caption="a red square", image=None):
    """The two files of one sample."""
    return [(f"{key}.png", image or picture()), (f"{key}.txt", caption.encode())]


def shards_of(folder, counts):
    """One shard for each of `counts`, with so many samples, whose captions are "shard sample" and all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        colours = [(17 * shard % 256, 29 * index % 256, 90) for index in range(count)]
        samples = [pair(f"{index:04d}", f"{shard} {index}", picture(colour)) for index, colour in enumerate(colours)]
        write_tar(folder / f"{shard:03d}.tar", sum(samples, []))
    return folder
