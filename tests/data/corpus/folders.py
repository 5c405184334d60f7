"""Folders of images with captions in metadata files, in text files and in `--caption`."""

import json
import os
import unicodedata

from tests.data.corpus import Expected, case
from tests.data.corpus.files import pixels, save, write_csv, write_jsonl

LONG = 1 << 20  # bytes; a caption has at most so many


def described(folder, *names, text="caption of {}"):
    """Images with text files of the same names; the samples that must come of them, in the order of names."""
    images = {name: save(folder / name, pixels(number)) for number, name in enumerate(names)}
    for name in names:
        (folder / name).with_suffix(".txt").write_text(text.format(name), encoding="utf-8")
    return [(images[name], text.format(name)) for name in sorted(names)]


def of(folder, *flags, **expected):
    """What must come of a folder."""
    return Expected(["--train_data_dir", folder, *flags], check_flags=list(flags), **expected)


# Names and folders.


@case
def a_file_is_called_train(folder):
    names = ["a.png", "eval.png", "test tube.png", "train.png", "validation.png"]
    images = [save(folder / name, pixels(number)) for number, name in enumerate(names)]
    write_jsonl(folder, [{"file_name": name, "text": f"caption of {name}"} for name in names])
    return of(folder, samples=[(image, f"caption of {name}") for image, name in zip(images, names)])


@case
def names_of_all_kinds(folder):
    names = [
        "a b.png",
        "a%20b.png",
        "图 像.png",
        "é.png",
        "emoji 👍🏽.png",
        "line\nbreak.png",
        "[1]*?.png",
        "n" * 251 + ".png",
    ]
    return of(
        folder, samples=described(folder, *names, "-rf.png", "UPPER.PNG", "a.b.c.jpeg.png"), printed=("11 images;",)
    )


@case
def a_name_that_is_no_utf8(folder):
    image = save(folder / "a.png", pixels(0))
    os.rename(folder / "a.png", os.fsencode(folder) + b"/\xff\xe9.png")
    (folder / os.fsdecode(b"\xff\xe9.txt")).write_text("x")
    return of(folder, samples=[(image, "x")])


@case
def only_the_folder_train_is_trained(folder):
    samples = described(folder / "train", "b.png", "sub/a.png")
    described(folder / "test", "c.png")
    described(folder, "d.png")
    return of(folder, samples=samples, printed=("2 images;", "not used: 2 in a folder that is not trained"))


@case
def links_to_files_folders_and_nowhere(folder):
    elsewhere = folder / "elsewhere"
    samples = described(elsewhere, "a.png")
    (folder / "photos").mkdir()
    (folder / "photos" / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder / "photos")
    (folder / "photos" / "b.png").symlink_to(elsewhere / "a.png")
    (folder / "photos" / "b.txt").symlink_to(elsewhere / "a.txt")
    (folder / "photos" / "c.png").symlink_to(folder / "nowhere.png")
    (folder / "photos" / "circle.png").symlink_to(folder / "photos" / "circle.png")
    printed = ("2 images;", "2 links that lead nowhere")
    return Expected(["--train_data_dir", folder / "photos"], [*samples, *samples], printed=printed)


# Text files.


@case
def a_text_file_beside_each_image(folder):
    samples = described(folder, "a.jpg.png", "cat.PNG", "photo.png", "photo.v2.png")
    (folder / "cat.txt").rename(folder / "cat.TXT")
    (folder / "photo.txt").rename(folder / "photo.caption")
    (folder / "a.jpg.txt").rename(folder / "a.jpg.png.txt")
    return of(folder, samples=samples, printed=("4 images; captions: 4 of text files",))


@case
def texts_are_stripped_and_an_empty_one_is_a_caption(folder):
    image = [save(folder / f"{name}.png", pixels(number)) for number, name in enumerate("abcd")]
    contents = {"a": b"\xef\xbb\xbf  a cat\r\n", "b": b"", "c": b" \n", "d": "两行\n第二行\n".encode()}
    for name, content in contents.items():
        (folder / f"{name}.txt").write_bytes(content)
    return of(folder, samples=list(zip(image, ["a cat", "", "", "两行\n第二行"])))


@case
def several_captions_in_a_text_file(folder):
    image = [save(folder / f"{name}.png", pixels(number)) for number, name in enumerate("abc")]
    for name, text in {"a": "one\n\n two \n", "b": "one", "c": "\n"}.items():
        (folder / f"{name}.txt").write_text(text)
    return of(folder, "--caption_separator", "\\n", samples=list(zip(image, [["one", "two"], "one", ""])))


@case
def text_files_in_other_encodings(folder):
    contents = [
        "小狗的照片".encode("gbk"),
        "小狗的照片".encode("utf-16"),
        "café".encode("latin-1"),
        b"a\0b",
        b"x" * (LONG + 1),
        b"fine",
    ]
    for number, (name, content) in enumerate(zip("abcdef", contents)):
        image = save(folder / f"{name}.png", pixels(number))
        (folder / f"{name}.txt").write_bytes(content)
    said = [
        "a.txt: it is not UTF-8, but probably GB18030 (`iconv -f GB18030",
        "b.txt: it is not UTF-8, but probably UTF-16",
    ]
    said += ["probably WINDOWS-1252", "d.txt: it holds NUL bytes", "e.txt: it has 1,048,577 bytes"]
    return of(
        folder,
        samples=[*said, (image, "fine")],
        printed=("6 images; captions: 1 of text files;", "not used: 5 without caption, for example"),
    )


@case
def no_text_file_that_can_be_used(folder):
    save(folder / "a.png", pixels(0))
    (folder / "a.txt").write_bytes(b"x\0")
    return of(folder, refused=("has no usable caption, for example", "a.txt: it holds NUL bytes", "--caption TEXT"))


@case
def metadata_before_text_files_before_the_flag(folder):
    image = [save(folder / f"{name}.png", pixels(number)) for number, name in enumerate("abcd")]
    rows = {"a.png": "of metadata", "b.png": None, "d.png": None}
    write_jsonl(folder, [{"file_name": name, "text": text} for name, text in rows.items()])
    for name in "ab":
        (folder / f"{name}.txt").write_text("of text")
    (folder / "b.caption").write_text("second choice")
    (folder / "notes.txt").write_text("nothing")
    (folder / "paper.pdf").write_text("nothing")
    said = "captions: 1 of metadata, 1 of text files, 2 of --caption; not used: 2 text files beside images that have "
    printed = (said, "1 text file without an image, for example", "1 other file, for example")
    captions = ["of metadata", "of text", "a photo of sks dog", "a photo of sks dog"]
    return of(folder, "--caption", "a photo of sks dog", samples=list(zip(image, captions)), printed=printed)


@case
def one_caption_for_all_images(folder):
    images = [save(folder / "dogs" / f"{name}.png", pixels(number)) for number, name in enumerate("ab")]
    return of(folder, "--caption", "", samples=[(image, "") for image in images])


@case
def images_without_any_caption(folder):
    save(folder / "a.png", pixels(0))
    three = ("has no captions; expected a metadata.jsonl with", "cat.txt beside cat.jpg", "--caption TEXT for all")
    return of(folder, refused=three)


@case
def one_image_without_a_caption(folder):
    samples = described(folder, "a.png", "b.png")
    (folder / "a.txt").unlink()
    bad = "a.png (row 0): it has no caption: no row of metadata is about it, and no text file beside it has its name"
    return of(folder, samples=[bad, samples[1]], printed=("2 images;", "not used: 1 without caption, for example"))


@case
def bad_samples_are_not_allowed_unless_it_is_said(folder):
    described(folder, "a.png", "b.png", "c.png")
    (folder / "a.txt").unlink()
    (folder / "b.png").write_bytes(b"no image")
    refused = ("2 of 3 samples cannot be used (2 bad samples, --max_bad_samples is 0): ", "a.png (row 0): it has no")
    return of(folder, refused=(*refused, "(and 1 more); --max_bad_samples 2 leaves them out"))


@case
def masks_are_no_images(folder):
    samples = described(folder, "a.png", "alone.mask.png")
    save(folder / "a.mask.png", pixels(9))
    return of(folder, samples=samples, printed=("2 images;", "1 mask, for example"))


# Metadata.


@case
def two_rows_for_one_image(folder):
    image = [save(folder / f"{name}.png", pixels(number)) for number, name in enumerate("abc")]
    rows = [("b", "one"), ("a", None), ("b", None), ("c", 3), ("a", ["x", "y"]), ("c", 4), ("b", "two")]
    write_jsonl(folder, [{"file_name": f"{name}.png", "text": text} for name, text in rows])
    bad = "column 'text' holds 3; expected a text or several"
    return of(folder, samples=[(image[0], ["x", "y"]), (image[1], ["one", "two"]), bad])


@case
def the_image_of_a_row_is_missing(folder):
    image = save(folder / "a.png", pixels(0))
    write_jsonl(
        folder, [{"file_name": name, "text": "x"} for name in ("a.png", "lost.png", "../out.png", "/tmp/out.png")]
    )
    printed = ("3 rows of metadata, for example", "metadata.jsonl line 2: there is no file", "lost.png")
    return of(folder, samples=[(image, "x")], printed=printed, check=1)


@case
def paths_as_other_systems_write_them(folder):
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    names = ["a/1.png", "a/2.png", f"a/{decomposed}", f"b/{composed}", "back\\slash.png"]
    images = [save(folder / name, pixels(number)) for number, name in enumerate(names)]
    written = ["./a//1.png", str(folder / "a" / "2.png"), f"a\\{composed}", f"b/{decomposed}", "back\\slash.png"]
    write_csv(folder, [("file_name", "text"), *zip(written, "12345")])
    return of(folder, samples=list(zip(images, "12345")))


@case
def text_files_with_names_of_another_system(folder):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    images = [save(folder / name / f"{accent}.png", pixels(0)) for name, accent in (("a", composed), ("b", decomposed))]
    (folder / "a" / f"{decomposed}.txt").write_text("1")
    (folder / "b" / f"{composed}.png.caption").write_text("2")
    return of(folder, samples=list(zip(images, "12")))


@case
def captions_that_look_like_missing_ones(folder):
    texts = ["None", "NA", "nan", "null", "007", "TRUE", "a, b", 'say "x"', "two\nlines"]
    names = [f"{number}.png" for number in range(len(texts))]
    images = [save(folder / name, pixels(number)) for number, name in enumerate(names)]
    write_csv(
        folder,
        [("file_name", " text", "image", ""), *((*row, "other.png", 1) for row in zip(names, texts)), ("", "", "", "")],
    )
    return of(folder, samples=list(zip(images, texts)))


@case
def columns_that_nobody_asked_for(folder):
    images = [save(folder / f"{name}.png", pixels(number)) for number, name in enumerate("abc")]
    more = [{"tags": 1, "image": "b.png"}, {"tags": ["x", {"y": None}]}, {"tags": float("nan"), "size": "big"}]
    write_jsonl(folder, [{"file_name": f"{name}.png", "text": name, **row} for name, row in zip("abc", more)])
    return of(folder, samples=list(zip(images, "abc")))


@case
def captions_of_megabytes(folder):
    image = [save(folder / f"{name}.png", pixels(number)) for number, name in enumerate("abc")]
    texts = ["x" * 2_000_000, "y" * LONG, "z" * 2_000_000]
    write_csv(folder, [("file_name", "text"), *zip(("a.png", "b.png", "c.png"), texts)])
    bad = "column 'text' holds a text of 2,000,000 bytes; expected at most 1,048,576"
    return of(folder, samples=[bad, (image[1], texts[1]), bad])


def refused_metadata(name, content, *parts):
    """Register a case of metadata that is refused by file, line and reason."""

    def write(folder):
        for number, image in enumerate(("a.png", "b.png")):
            save(folder / image, pixels(number))
        file = folder / (
            "metadata.csv" if content.startswith((b"file_name", b'"file_name', b"\xff\xfef")) else "metadata.jsonl"
        )
        file.write_bytes(content)
        return of(folder, refused=(file.name, *parts))

    write.__name__ = name
    case(write)


JSON = json.dumps({"file_name": "a.png", "text": "x"}).encode() + b"\n"
CSV = b"file_name,text\na.png,x\n"
refused_metadata(
    "json_in_gbk",
    JSON + '{"file_name": "b.png", "text": "小狗的照片"}'.encode("gbk"),
    "line 2: it is not UTF-8, but probably GB18030",
)
refused_metadata("csv_in_utf16", CSV.decode().encode("utf-16"), "line 1: it is not UTF-8, but probably UTF-16")
refused_metadata(
    "json_in_latin_1",
    '{"file_name": "a.png", "text": "café"}'.encode("latin-1"),
    "line 1: it is not UTF-8, but probably WINDOWS-1252",
)
refused_metadata(
    "json_as_an_array", b"[" + JSON.strip() + b"]", "line 1: it is a JSON array; expected one row per line"
)
refused_metadata(
    "json_as_a_long_array", b"[\n" + JSON.strip() + b",\n]", "line 1: it is a JSON array; expected one row per line"
)
refused_metadata(
    "json_with_a_comma_at_the_end",
    JSON + b'{"file_name": "b.png", "text": "x",}',
    "line 2: it is not JSON: ",
    "in column 3",
)
refused_metadata(
    "json_with_a_name_twice",
    JSON + b'{"file_name": "b.png", "text": "x", "text": "y"}',
    "line 2: ",
    "the name 'text' is there twice",
)
refused_metadata(
    "csv_with_semicolons", CSV.replace(b",", b";"), "line 1: its columns are separated by semicolons; expected commas"
)
refused_metadata(
    "csv_with_tabs", CSV.replace(b",", b"\t"), "line 1: its columns are separated by tabs; expected commas"
)
refused_metadata("csv_with_an_open_quote", CSV + b'b.png,"x\nc.png,y\n', "line 3: its double quotes are not in pairs")
refused_metadata("csv_with_a_comma_too_many", CSV + b"b.png,x, y\n", "line 3: it has 3 fields and the header has 2")
refused_metadata("csv_with_a_comma_at_the_end", CSV + b"b.png,x,\n", "line 3: it has 3 fields and the header has 2")
refused_metadata(
    "csv_with_a_column_twice", CSV.replace(b"text", b"text,text"), "line 1: the column 'text' is there twice"
)
refused_metadata("csv_with_nul_bytes", CSV + b"b.png,x\0\n", "line 3: it holds NUL bytes")


@case
def masks_with_capital_letters(folder):
    image = save(folder / "a.png", pixels(0))
    for name in ("a.MASK.PNG", "a.Mask.jpg"):
        save(folder / name, pixels(1))
    return Expected(["--train_data_dir", folder, "--caption", "x"], [(image, "x")], check_flags=["--caption", "x"])


@case
def links_to_devices(folder):
    image = save(folder / "a.png", pixels(0))
    os.symlink("/dev/zero", folder / "a.txt")
    os.symlink("/dev/zero", folder / "z.png")
    return Expected(["--train_data_dir", folder, "--caption", "x"], [(image, "x")], check_flags=["--caption", "x"])


@case
def one_caption_for_rows_that_have_none(folder):
    image = save(folder / "a.png", pixels(0))
    write_csv(folder, [["file_name"], ["a.png"]])
    return Expected(["--train_data_dir", folder, "--caption", "x"], [(image, "x")], check_flags=["--caption", "x"])
