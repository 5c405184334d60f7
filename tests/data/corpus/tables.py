"""Tables as `datasets`, pandas and pyarrow write them, and folders with archives."""

import functools
import io
import json
import os
import pickle
import zipfile

import datasets
import pandas
import pyarrow
from PIL import Image
from pyarrow import parquet

from tests.data.corpus import Expected, case
from tests.data.corpus.files import pixels, save


def png(number):
    """The bytes of a PNG of `pixels(number)`."""
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


IMAGES = [png(0), png(1)]
BOTH = [(pixels(0), "a"), (pixels(1), "b")]


def data(folder, samples=None, *flags, **expected):
    return Expected(["--train_data_dir", folder, *flags], samples, check_flags=list(flags), **expected)


def named(source, samples=None, *flags, **expected):
    return Expected(["--dataset_name", source, *flags], samples, check_flags=list(flags), **expected)


def refused(expected, *parts):
    expected.refused, expected.check = parts, 2
    return expected


def write_parquet(folder, images, captions, name="x.parquet"):
    table = pyarrow.table({"image": images, "text": captions})
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / name)


def write_zip(file, members):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@case
def table_of_structs_by_pandas(folder):
    rows = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(IMAGES)]
    pandas.DataFrame({"image": rows, "text": ["a", "b"]}).to_parquet(folder / "train.parquet")
    return data(folder, BOTH)


@case
def table_of_bytes_by_pandas_with_a_null_caption_and_a_null_image(folder):
    frame = pandas.DataFrame({"image": [*IMAGES, None], "text": ["a", None, "c"]})
    frame.to_parquet(folder / "x.parquet")
    return data(folder, [BOTH[0], "row 1: column 'text' holds None", "row 2: column 'image' holds no image"])


@case
def table_in_one_file_with_other_columns(folder):
    frame = pandas.DataFrame(
        {"jpg": IMAGES, "caption": ["a", "b"], "size": [1, 2], "kind": pandas.Categorical(["x", "y"])}
    )
    frame.to_parquet(folder / "photos.parquet")
    return named(folder / "photos.parquet", BOTH, "--image_column", "jpg", "--caption_column", "caption")


def table_with_captions(kind):
    """The two captions as a column of another type."""
    texts = {
        "large_string": pyarrow.array(["a", "b"], pyarrow.large_string()),
        "dictionary": pyarrow.array(["a", "b"]).dictionary_encode(),
        "list_of_large_strings": pyarrow.array([["a"], ["b"]], pyarrow.list_(pyarrow.large_string())),
        "large_list": pyarrow.array([["a"], ["b"]], pyarrow.large_list(pyarrow.string())),
        "fixed_list": pyarrow.array([["a"], ["b"]], pyarrow.list_(pyarrow.string(), 1)),
    }[kind]

    def write(folder, streamed):
        if streamed:
            table = pyarrow.table({"image": pyarrow.array(IMAGES, pyarrow.large_binary()), "text": texts})
            with (
                pyarrow.OSFile(str(folder / "x.arrow"), "wb") as file,
                pyarrow.ipc.new_stream(file, table.schema) as out,
            ):
                out.write_table(table)
        else:
            write_parquet(folder, IMAGES, texts)
        return data(folder, BOTH)

    for streamed in (False, True):
        one = functools.partial(write, streamed=streamed)
        one.__name__ = f"table_with_{kind}_in_{'arrow' if streamed else 'parquet'}"
        case(one)


for kind in ("large_string", "dictionary", "list_of_large_strings", "large_list", "fixed_list"):
    table_with_captions(kind)


@case
def table_whose_first_file_has_no_captions(folder):
    write_parquet(folder, IMAGES[:1], [None], "0.parquet")
    write_parquet(folder, IMAGES[1:], [["b", "c"]], "1.parquet")
    return data(folder, ["row 0: column 'text' holds None", (pixels(1), ["b", "c"])])


@case
def table_in_a_damaged_file(folder):
    write_parquet(folder, IMAGES, ["a", "b"], "0.parquet")
    (folder / "1.parquet").write_bytes(b"PAR1")
    return refused(data(folder), "1.parquet: it cannot be read: Parquet file size is 4 bytes")


@case
def table_without_rows(folder):
    write_parquet(folder, pyarrow.array([], pyarrow.binary()), pyarrow.array([], pyarrow.string()))
    return data(folder, refused=("has no samples",))


@case
def table_with_numbers_as_captions(folder):
    write_parquet(folder, IMAGES, [1, 2])
    return refused(
        data(folder), "--caption_column: ", "holds int64; expected texts or lists of texts", "image (binary)"
    )


@case
def table_with_lists_of_images(folder):
    write_parquet(folder, [[image] for image in IMAGES], ["a", "b"])
    return refused(data(folder), "--image_column: ", "does not hold images, but list<", "text (string)")


@case
def table_without_the_column(folder):
    write_parquet(folder, IMAGES, ["a", "b"])
    said = "--caption_column: ", "has no column 'words'; it has image (binary), text (string)"
    return refused(data(folder, None, "--caption_column", "words"), *said)


@case
def table_of_addresses(folder):
    write_parquet(folder, ["https://example.org/a.png"], ["a"])
    return refused(data(folder), "--image_column: ", "holds addresses such as 'https://example.org/a.png'", "download")


@case
def table_of_images_that_came_from_addresses(folder):
    rows = [{"bytes": content, "path": f"https://example.org/{number}.png"} for number, content in enumerate(IMAGES)]
    write_parquet(folder, rows, ["a", "b"])
    return data(folder, BOTH)


@case
def table_of_texts_as_bytes(folder):
    write_parquet(folder, [{"bytes": "iVBORw0KGgo=", "path": "a.png"}], ["a"])
    return refused(data(folder), "does not hold images, but struct<bytes: string, path: string>; expected bytes, paths")


@case
def table_of_paths(folder):
    for number in (0, 1):
        save(folder / "photos" / f"{number}.png", pixels(number))
    (folder / "lists").mkdir()
    names = ["../photos/0.png", "photos\\1.png", str(folder / "photos" / "1.png"), "lost.png"]
    write_parquet(folder / "lists", names, list("abcd"))
    return data(folder, [*BOTH, (pixels(1), "c"), "lost.png (row 3): the image cannot be read: [Errno 2] No such file"])


@case
def table_with_a_path_that_means_two_files(folder):
    save(folder / "a.png", pixels(0))
    save(folder / "lists" / "a.png", pixels(1))
    write_parquet(folder / "lists", ["a.png"], ["a"])
    return data(folder, ["a.png (row 0): the path may mean "])


def text_table(ending, content, samples):
    def write(folder):
        for number in (0, 1):
            save(folder / "photos" / f"{number}.png", pixels(number))
        (folder / f"list.{ending}").write_text(content, encoding="utf-8-sig")
        return named(folder / f"list.{ending}", samples)

    write.__name__ = f"table_in_{ending}"
    case(write)


NONE = [(pixels(0), "None"), (pixels(1), "007")]
text_table("csv", "image,text,x\nphotos/0.png,None,1\nphotos/1.png,007,\n", NONE)
text_table("tsv", "text\timage\nNone\tphotos/0.png\n007\tphotos/1.png\n", NONE)
text_table("json", json.dumps([{"file_name": f"photos/{n}.png", "text": text} for n, text in enumerate("ab")]), BOTH)
text_table(
    "jsonl",
    '{"image": "photos/0.png", "text": ["a", "b"], "x": 1}\n\n{"image": "photos/1.png", "x": "y"}\n',
    [(pixels(0), ["a", "b"]), "photos/1.png (row 1): column 'text' holds None"],
)


@case
def table_in_jsonl_with_a_bad_line(folder):
    (folder / "list.jsonl").write_text('{"image": "a.png", "text": "a"}\n{"image": "b.png", "text": 7}\n{"image":\n')
    expected = named(folder / "list.jsonl", refused=("list.jsonl line 2: column 'text' holds 7", "(and 1 more)"))
    expected.check = 1
    return expected


def photo_zip(folder, name="photos.zip", prefix=""):
    write_zip(folder / name, {f"{prefix}{number}.png": image for number, image in enumerate(IMAGES)})


@case
def zip_of_images_with_metadata(folder):
    rows = "".join(json.dumps({"file_name": f"{n}.png", "text": text}) + "\n" for n, text in enumerate("ab"))
    members = {f"in/{number}.png": image for number, image in enumerate(IMAGES)}
    write_zip(folder / "photos.zip", {**members, "in/metadata.jsonl": rows, "__MACOSX/in/._0.png": b"x"})
    return data(folder, BOTH, printed=("1 zip archives are unpacked into",))


@case
def zip_of_images_beside_metadata(folder):
    photo_zip(folder, "test.zip")
    rows = "".join(json.dumps({"file_name": f"{n}.png", "text": text}) + "\n" for n, text in enumerate("ab"))
    (folder / "metadata.jsonl").write_text(rows)
    return named(folder, BOTH)


@case
def table_of_paths_into_a_zip(folder):
    photo_zip(folder / ".", prefix="in/")
    names = ["in/0.png", "zip://in/1.png::photos.zip", "photos.zip/in/1.png"]
    write_parquet(folder, names, ["a", "b", "c"])
    return data(folder, [*BOTH, (pixels(1), "c")])


class NameOfBytes(zipfile.ZipInfo):
    """A file of an archive, whose name is written without a word on its encoding."""

    def _encodeFilenameFlags(self):
        return self.written, self.flag_bits


@case
def zip_with_names_in_other_encodings(folder):
    names = {"in\\照片.png": "gb18030", "in/图片.png": "utf-8"}
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for (name, encoding), image in zip(names.items(), IMAGES):
            member = NameOfBytes("x")
            member.written = name.encode(encoding)
            archive.writestr(member, image)
    rows = [{"file_name": f"in/{name}.png", "text": text} for name, text in zip(("照片", "图片"), "ab")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data(folder, BOTH[::-1])


@case
def zip_with_names_that_are_there_already(folder):
    photo_zip(folder)
    save(folder / "1.png", pixels(1))
    return refused(data(folder), "1.png is in photos.zip and in 1.png; expected one of them")


@case
def zip_without_a_place_to_unpack_it(folder):
    photo_zip(folder)
    (folder / "file").write_text("")
    said = ("--index_dir: unpacked archives cannot be written to", "expected a folder in which files can be made")
    return refused(data(folder, None, "--index_dir", folder / "file" / "index"), *said)


@case
def zip_that_climbs(folder):
    write_zip(folder / "photos.zip", {"../0.png": IMAGES[0]})
    return refused(data(folder), "photos.zip: the name '../0.png' points outside the archive")


@case
def zip_that_is_damaged(folder):
    (folder / "photos.zip").write_bytes(b"PK" * 100)
    return refused(data(folder), "photos.zip: it cannot be unpacked: File is not a zip file")


def saved_table():
    table = datasets.Dataset.from_dict({"image": [{"bytes": image} for image in IMAGES], "text": ["a", "b"]})
    return table.cast_column("image", datasets.Image())


@case
def saved_by_datasets(folder):
    saved_table().save_to_disk(folder)
    return data(folder, BOTH)


@case
def saved_by_datasets_in_splits(folder):
    datasets.DatasetDict({"fit": saved_table(), "val": saved_table().select([1])}).save_to_disk(folder)
    return named(folder, BOTH[1:], "--dataset_split", "val")


@case
def saved_without_the_split(folder):
    datasets.DatasetDict({"fit": saved_table()}).save_to_disk(folder)
    return refused(named(folder), "has the splits fit; expected one named train: --dataset_split takes another")


@case
def splits_in_file_names(folder):
    write_parquet(folder / "data", IMAGES[:1], ["a"], "my test.parquet")
    write_parquet(folder / "data", IMAGES[1:], ["b"], "train-00000-of-00001.parquet")
    write_parquet(folder / "data", IMAGES[:1], ["c"], "test-00000-of-00001.parquet")
    return data(folder, BOTH)


@case
def split_in_a_file_name(folder):
    write_parquet(folder / "data", IMAGES[:1], ["a"], "train-00000-of-00001.parquet")
    write_parquet(folder / "data", IMAGES[1:], ["b"], "dev-00000-of-00001.parquet")
    return data(folder, BOTH[1:], "--dataset_split", "validation")


@case
def splits_in_a_readme(folder):
    write_parquet(folder, IMAGES, ["a", "b"], "first.parquet")
    write_parquet(folder, IMAGES[:1], ["c"], "second.parquet")
    lines = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("first", "second"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{lines}---\n")
    return data(folder, [(pixels(0), "c")], "--dataset_split", "second")


@case
def folder_of_images_has_no_splits(folder):
    save(folder / "a.png", pixels(0))
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    return refused(data(folder, None, "--dataset_split", "test"), "--dataset_split: a folder of images has none")


def raising_script(file):
    file.write_text("raise SystemExit('this code has run')\n")


@case
def script_that_loads_the_data(folder):
    raising_script(folder / "data.py")
    return refused(named(folder), "holds no data, but data.py; expected")


@case
def script_beside_a_table(folder):
    raising_script(folder / f"{folder.name}.py")
    write_parquet(folder, IMAGES, ["a", "b"])
    return named(folder, BOTH)


@case
def script_beside_configurations(folder):
    raising_script(folder / f"{folder.name}.py")
    write_parquet(folder, IMAGES, ["a", "b"])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: x.parquet\n---\n")
    return refused(named(folder), "is loaded by a script of its own, which is never run here")


@case
def pickles(folder):
    (folder / "x.pkl").write_bytes(pickle.dumps(raising_script))
    expected = Expected(
        ["--dataset_name", "pandas", "--train_data_dir", folder], refused=("reads pickles, which can run",)
    )
    expected.check = 2
    return expected


@case
def folder_of_a_rar(folder):
    (folder / "b.rar").write_bytes(b"x")
    return refused(data(folder), "holds no data, but b.rar; expected images with captions")


@case
def table_that_names_a_pipe_and_a_device(folder):
    os.mkfifo(folder / "f.png")
    image = save(folder / "a.png", pixels(0))
    (folder / "t.csv").write_text("image,text\na.png,x\nf.png,y\n/dev/zero,z\n")
    bad = "it is not a regular file, but a device or pipe"
    return Expected(["--dataset_name", folder / "t.csv"], [(image, "x"), bad, bad])
