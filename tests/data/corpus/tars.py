"""Tar shards: good ones, and broken ones. Nearly all are read as streams, too (`test_streams.py`)."""

import gzip
import io
import json
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from tests.data.corpus import Expected, case
from tests.data.corpus.files import pixels
from tests.data.make_shards import pair, picture, write_tar

RED = np.full((30, 40, 3), (255, 0, 0), np.uint8)
GOOD, SEEN = pair("good", "a good one"), (RED, "a good one")
CONSECUTIVE = "the files of a sample must follow each other in the archive"


def shards(folder, samples=None, **expected):
    return Expected(["--train_shards_path_or_url", folder], samples, **expected)


def encoded(number, form, **options):
    """The bytes of random pixels in a format of Pillow's."""
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, form, **options)
    return file.getvalue()


def bomb():
    """A small file whose header declares 10,000 megapixels."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Files that follow a good sample, and what is said of them: a part of each message, in the order of the samples.
BROKEN = {
    "missing_text": ([("b.png", picture())], ["b.png: it has no caption, only .png; expected a .txt"]),
    "missing_image": ([("b.txt", b"x"), ("b.svg", b"x")], ["b.txt: it has no image, only b.txt, b.svg; exp"]),
    "text_as_image": (pair("b", image=b"<html>404</html>"), ["b.png: the image cannot be read: "]),
    "same_key": ([*pair("b"), *GOOD], [(RED, "a red square"), "good.png: there was a sample of this name before"]),
    "same_file": ([*pair("b"), ("b.png", picture())], ["b.png: a file is there twice: b.png, b.txt, b.png"]),
    "bomb": (pair("b", image=bomb()), ["b.png: the image cannot be read: Image size (10000000000 pixels)"]),
    "climbs": (pair("../../b"), ["../../b.png: its name points outside the archive"]),
    "absolute": (pair("/etc/b"), ["/etc/b.png: its name points outside the archive"]),
    "not_utf8": ([("b.png", picture()), ("b.txt", b"\xff\xfe")], ["b.png: b.txt cannot be read: 'utf-8'"]),
    "no_json": ([("b.png", picture()), ("b.json", b"{")], ["b.png: b.json cannot be read: Expecting"]),
    "no_field": (
        [("b.png", picture()), ("b.json", b'{"key": 1, "prompt": "x"}')],
        ["b.png: b.json has no 'text', but the fields key, prompt; --caption_column"],
    ),
    "list_in_json": ([("b.png", picture()), ("b.json", b"[1]")], ["b.png: b.json has no 'text', but a list"]),
    "number": ([("b.png", picture()), ("b.json", b'{"text": 1}')], ["b.png: b.json has [1] for 'text'; exp"]),
    "half_a_pair": (
        [("b.png", picture()), ("b.json", b'{"text": "\\ud800"}')],
        ["b.png: b.json holds half of a surrogate pair"],
    ),
    "huge_text": ([("b.png", picture()), ("b.txt", b"x" * 2**21)], ["b.png: b.txt has 2,097,152 bytes; exp"]),
    "dotted_pair_beside_a_plain_one": (
        [*pair("photo"), *pair("photo.v2")],
        [(RED, "a red square"), "photo.v2.png: the name of a sample ends at its first dot, so this is the file v2.png"],
    ),
    "dotted_word_with_a_text": (
        [*pair("photo.left"), *pair("photo")],
        [(RED, "a red square"), "photo.left.png: the name of a sample ends at its first dot"],
    ),
    "dotted_number_without_a_text": (
        [*pair("photo"), ("photo.2.png", picture())],
        [(RED, "a red square"), "photo.2.png: the name of a sample ends at its first dot"],
    ),
    "dotted_images_without_a_plain_one": (
        [("photo.left.png", picture()), ("photo.right.png", picture()), ("photo.txt", b"x")],
        [f"photo.{side}.png: the name of a sample ends at its first dot" for side in ("left", "right")],
    ),
    "twenty_dotted_pairs": (
        sum((pair(f"shot_0.{number:02d}_x") for number in range(20)), []),
        [f"shot_0.{number:02d}_x.png: the name of a sample ends at its first dot" for number in range(20)],
    ),
    "images_before_texts": (
        [file for kind in (0, 1) for key in "bcd" for file in [pair(key)[kind]]],
        [f"{key}.png: it has no caption, only .png; expected a .txt, .text" for key in "bcd"],
    ),
    "texts_before_images": (
        [file for kind in (1, 0) for key in "bc" for file in [pair(key)[kind]]],
        [
            *(f"{key}.txt: it has no image, only {key}.txt; expected" for key in "bc"),
            *(f"{key}.png: there was a sample of this name before; {CONSECUTIVE}" for key in "bc"),
        ],
    ),
}  # fmt: skip


def broken(name):
    files, said = BROKEN[name]

    def write(folder):
        write_tar(folder / "x.tar", [*GOOD, *files])
        return shards(folder, [SEEN, *said])

    write.__name__ = f"tar_{name}"
    case(write)


for name in BROKEN:
    broken(name)


@case
def tar_is_empty(folder):
    write_tar(folder / "x.tar", [])
    return shards(folder, ["the archive: it holds no samples"])


@case
def tar_is_cut_short(folder):
    whole = write_tar(folder / "x.tar", [*GOOD, *pair("b"), ("c.png", picture()), ("c.txt", b"x")])
    whole.write_bytes(whole.read_bytes()[: 512 * 7 + 5])  # within the text of b
    return shards(folder, [SEEN, "the archive: it is cut short or damaged after b.png"])


@case
def tar_is_damaged(folder):
    damaged = write_tar(folder / "x.tar", [*GOOD, *pair("b")])
    content = bytearray(damaged.read_bytes())
    content[512 * 4 : 512 * 4 + 100] = b"?" * 100
    damaged.write_bytes(content)
    return shards(folder, [SEEN, "the archive: it is cut short or damaged after good.txt"])


@case
def tar_is_nothing(folder):
    (folder / "x.tar").write_bytes(b"")
    return shards(folder, ["the archive: it is no tar archive: empty file"])


@case
def tar_is_a_page(folder):
    (folder / "x.tar").write_bytes(b"<html>not found</html>" * 100)
    return shards(folder, ["the archive: it is no tar archive: "])


@case
def tar_extensions_in_capitals_and_names_in_any_script(folder):
    image = encoded(1, "PNG")
    write_tar(folder / "x.tar", [("A/图 1.PNG", image), ("A/图 1.TXT", "一".encode("utf-8-sig")), *GOOD])
    return shards(folder, [(pixels(1), "一"), SEEN])


@case
def tar_images_of_all_formats(folder):
    forms = {"gif": "GIF", "bmp": "BMP", "TIFF": "TIFF", "webp": "WEBP", "jfif": "JPEG", "ppm": "PPM"}
    images = [RED if name in ("gif", "jfif", "webp") else pixels(number) for number, name in enumerate(forms)]
    files = []
    for name, form in forms.items():
        content = picture(format=form) if images[len(files) // 2] is RED else encoded(len(files) // 2, form)
        files += [(f"{name}.{name}", content), (f"{name}.txt", name.encode())]
    write_tar(folder / "x.tar", files)
    return shards(folder, list(zip(images, forms)), tolerance=3)


@case
def tar_with_folders_in_it(folder):
    names = ["./a.b/c", "d", "a.b"]
    files = sum((pair(f"{name}/1", name, encoded(number, "PNG")) for number, name in enumerate(names)), [])
    (folder / "deep").mkdir()
    write_tar(folder / "deep" / "x.tar", files)
    return shards(folder, [(pixels(number), name) for number, name in enumerate(names)])


@case
def tar_with_links_and_a_device(folder):
    with tarfile.open(folder / "x.tar", "w") as archive:
        for name, kind in (("b", tarfile.SYMTYPE), ("c", tarfile.LNKTYPE), ("d", tarfile.CHRTYPE), ("good", None)):
            for file, content in pair(name, "a good one"):
                member = tarfile.TarInfo(file)
                member.size = len(content)
                if kind and file.endswith("png"):
                    member.type, member.linkname, member.size = kind, "good.png", 0
                archive.addfile(member, io.BytesIO(content))
    links = [f"{name}.png: it is a link to good.png, not a file; expected an archive of `tar -h" for name in "bc"]
    return shards(folder, [*links, "d.png: it is no file, but a device or pipe", SEEN])


def tar_of_form(folder, form):
    with tarfile.open(folder / "x.tar", "w", format=form) as archive:
        for file, content in pair("n" * 150 + "/" + "m" * 150, "long", encoded(1, "PNG")) + GOOD:
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return shards(folder, [(pixels(1), "long"), SEEN])


@case
def tar_with_long_names_of_gnu(folder):
    return tar_of_form(folder, tarfile.GNU_FORMAT)


@case
def tar_with_long_names_of_pax(folder):
    return tar_of_form(folder, tarfile.PAX_FORMAT)


@case
def tar_with_a_sparse_file(folder):
    image, where = picture(), 2**16
    header = tarfile.TarInfo("b.png")
    header.size = len(image)
    header.pax_headers = {"GNU.sparse.size": str(where + len(image)), "GNU.sparse.map": f"{where},{len(image)}"}
    with tarfile.open(folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(header, io.BytesIO(image))
        for file, content in [pair("b")[1], *GOOD]:
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return shards(folder, ["b.png: it is a sparse file; expected an archive of `tar` without", SEEN])


@case
def tar_with_a_name_that_is_not_utf8(folder):
    with tarfile.open(folder / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for file, content in [*pair("caf\xe9"), *GOOD, ("\xe9.png", b"x")]:
            member = tarfile.TarInfo(file)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return shards(folder, [(RED, "a red square"), SEEN, r"\xe9.png: it has no caption"])


@case
def tar_with_more_images_in_a_sample(folder):
    image, text = pair("a", "the photo", encoded(1, "PNG"))
    jpeg = encoded(2, "JPEG", quality=95)
    write_tar(
        folder / "x.tar",
        [image, ("a.mask.png", picture()), text, ("b.png", picture()), ("b.jpg", jpeg), ("b.txt", b"x")],
    )
    shown = ("not used: 1 more pictures of samples, for example", "x.tar: b.png", "not used: 1 mask of samples")
    return shards(folder, [(pixels(1), "the photo"), (None, "x")], printed=shown)


@case
def tar_with_what_belongs_to_no_sample(folder):
    others = [(".DS_Store", b"x"), ("._a.png", b"x"), ("__meta__.json", b"x"), ("README", b"x")]
    write_tar(folder / "x.tar", [*others, *GOOD])
    return shards(folder, [SEEN])


@case
def tar_with_captions_in_a_field(folder):
    text = json.dumps({"label": ["a", "b"], "text": "other"}).encode()
    write_tar(folder / "x.tar", [("1.png", picture()), ("1.json", text), *pair("2", "c")])
    flags = ["--train_shards_path_or_url", folder, "--caption_column", "label"]
    return Expected(flags, [(RED, ["a", "b"]), (RED, "c")], check_flags=flags[2:])


@case
def tar_is_compressed(folder):
    write_tar(folder / "a.tar", GOOD)
    (folder / "b.tar.gz").write_bytes(gzip.compress((folder / "a.tar").read_bytes()))
    said = ("b.tar.gz' is compressed, so its samples cannot be read in any order", "uncompress it, or stream it")
    return shards(folder, refused=said, check=2)


@case
def tar_is_compressed_under_another_name(folder):
    whole = write_tar(folder / "x.tar", GOOD)
    whole.write_bytes(gzip.compress(whole.read_bytes()))
    return shards(folder, ["the archive: it is compressed (gzip); expected a plain tar archive"])


@case
def tars_in_place_of_a_folder(folder):
    write_tar(folder / "x.tar", GOOD)
    return Expected(["--train_data_dir", folder], refused=("--train_shards_path_or_url",), check=0)


@case
def tar_has_no_splits(folder):
    write_tar(folder / "x.tar", GOOD)
    flags = ["--train_shards_path_or_url", folder, "--dataset_split", "test"]
    return Expected(flags, refused=("--dataset_split: shards have no splits",), check_flags=flags[2:], check=2)


@case
def tar_whose_index_cannot_be_written(folder):
    write_tar(folder / "x.tar", GOOD)
    (folder / "file").write_text("")
    flags = ["--train_shards_path_or_url", folder / "x.tar", "--index_dir", folder / "file" / "index"]
    said = ("--index_dir: ", "cannot be written", "so the next start will read all shards again")
    return Expected(flags, [SEEN], printed=said, check_flags=flags[2:])


@case
def tars_joined_into_one(folder):
    parts = [write_tar(folder / f"{name}.part", pair(name)).read_bytes() for name in "ab"]
    (folder / "x.tar").write_bytes(b"".join(parts))
    said = "the archive: data follow its end; expected a file for each archive"
    return Expected(["--train_shards_path_or_url", folder / "x.tar"], [(None, "a red square"), said])


@case
def tar_with_json_of_many_levels(folder):
    deep = b'{"text": "x", "more": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    write_tar(folder / "x.tar", [*pair("a"), ("b.png", picture()), ("b.json", deep)])
    samples = [(None, "a red square"), "b.png: b.json cannot be read: "]
    return Expected(["--train_shards_path_or_url", folder / "x.tar"], samples)


@case
def tars_of_several_splits(folder):
    for name in ("test-0.tar", "train-0.tar", "val/1.tar", "valley.tar"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_tar(folder / name, pair("a", f"of {name}"))
    samples = [(None, "of train-0.tar"), (None, "of valley.tar")]
    printed = ("not used: 2 shards of other splits, for example test-0.tar",)
    return Expected(["--train_shards_path_or_url", folder], samples, printed=printed)


@case
def tar_with_a_name_twice_in_json(folder):
    write_tar(folder / "x.tar", [("a.png", picture()), ("a.json", b'{"text": "x", "text": "y"}')])
    said = "a.png: a.json cannot be read: the name 'text' is there twice"
    return Expected(["--train_shards_path_or_url", folder / "x.tar"], refused=(said,))
