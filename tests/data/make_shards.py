"""Tar shards for tests: good ones, and a corpus of broken ones."""

import io
import struct
import tarfile
import zlib

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


def bomb():
    """A small file whose header declares 10,000 megapixels."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_shards(folder):
    """Write the corpus and return `{file: what is said of it}`. Each holds a good sample, but for those that cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    good = pair("good", "a good one")
    corpus = {
        "missing-text": ([*good, ("b.png", picture())], "b.png: it has no caption, only .png; expected a .txt"),
        "missing-image": ([*good, ("b.txt", b"x"), ("b.gif", b"x")], "b.txt: it has no image, only b.txt, b.gif; exp"),
        "text-as-picture": ([*good, *pair("b", image=b"<html>404</html>")], "b.png: the image cannot be read: "),
        "same-key": ([*good, *pair("b"), *good], "good.png: there was a sample of this name before"),
        "same-file": ([*good, *pair("b"), ("b.png", picture())], "b.png: a file is there twice: b.png, b.txt, b.png"),
        "bomb": ([*good, *pair("b", image=bomb())], "b.png: the image cannot be read: Image size (10000000000 pixels)"),
        "climbs": ([*good, *pair("../../b")], "../../b.png: its name points outside the archive"),
        "absolute": ([*good, *pair("/etc/b")], "/etc/b.png: its name points outside the archive"),
        "not-utf8": ([*good, ("b.png", picture()), ("b.txt", b"\xff\xfe")], "b.png: b.txt cannot be read: 'utf-8'"),
        "no-json": ([*good, ("b.png", picture()), ("b.json", b"{")], "b.png: b.json cannot be read: Expecting"),
        "no-field": ([*good, ("b.png", picture()), ("b.json", b'{"key": 1}')], "b.png: b.json has no 'text'"),
        "number": ([*good, ("b.png", picture()), ("b.json", b'{"text": 1}')], "b.png: b.json has [1] for 'text'; exp"),
        "huge-text": (
            [*good, ("b.png", picture()), ("b.txt", b"x" * 2**21)],
            "b.png: b.txt has 2,097,152 bytes; exp",
        ),
        "empty": ([], "the archive: it holds no samples"),
    }
    expected = {}
    for name, (files, message) in corpus.items():
        expected[write_tar(folder / f"{name}.tar", files)] = message
    whole = write_tar(folder / "truncated.tar", [*good, *pair("b"), ("c.png", picture()), ("c.txt", b"x")])
    whole.write_bytes(whole.read_bytes()[: 512 * 7 + 5])  # within the text of b
    expected[whole] = "the archive: it is cut short or damaged after b.png"
    damaged = write_tar(folder / "damaged.tar", [*good, *pair("b")])
    content = bytearray(damaged.read_bytes())
    content[512 * 4 : 512 * 4 + 100] = b"?" * 100
    damaged.write_bytes(content)
    expected[damaged] = "the archive: it is cut short or damaged after good.txt"
    (folder / "nothing.tar").write_bytes(b"")
    expected[folder / "nothing.tar"] = "the archive: it is no tar archive: empty file"
    (folder / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    expected[folder / "page.tar"] = "the archive: it is no tar archive: "
    return expected
