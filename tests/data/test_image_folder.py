import ppdiffusers_train  # noqa: F401

import argparse
import json
import struct

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from ppdiffusers_train.arguments import add_data_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.rows import reading
from ppdiffusers_train.errors import BadSampleError, UserError
from tests.conftest import PHOTOS, copy_photos

pytestmark = pytest.mark.once  # no Paddle in it


def dataset_of(*flags, seed=None):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(list(map(str, flags)))
    args.seed = seed
    return build_dataset(args)


def captions(dataset):
    return [dataset[index]["caption"] for index in range(len(dataset))]


def test_a_folder_gives_every_photograph_with_its_caption():
    rows = dataset_of("--train_data_dir", PHOTOS)
    described = {row["file_name"]: row["text"] for row in map(json.loads, (PHOTOS / "metadata.jsonl").open())}
    assert len(rows) == len(described) == 15
    for index in range(len(rows)):
        row, file = rows[index], rows.name(index).split("/")[-1].split(" ")[0]
        assert row["caption"] == described[file]
        assert row["image"].mode == "RGB" and row["image"].size == Image.open(PHOTOS / file).size


def test_columns_may_have_any_name_and_captions_may_be_lists(tmp_path):
    image = Image.new("RGBA", (5, 4), "red")
    table = datasets.Dataset.from_dict({"picture": [image, image], "words": [["a", "b"], ["c"]]})
    table.cast_column("picture", datasets.Image()).to_parquet(str(tmp_path / "data" / "train.parquet"))
    rows = dataset_of("--dataset_name", tmp_path / "data", "--image_column", "picture", "--caption_column", "words")
    assert captions(rows) == [["a", "b"], "c"]
    assert np.array(rows[0]["image"]).tolist() == [[[255, 0, 0]] * 5] * 4
    assert rows.name(1) == "row 1"


def test_dataset_config_name_chooses_among_configurations(tmp_path):
    for name in ("one", "two"):
        table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (2, 2))], "text": [name]})
        table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "d" / name / "train.parquet"))
    (tmp_path / "d" / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("one", "two"))
        + "---\n"
    )
    assert captions(dataset_of("--dataset_name", tmp_path / "d", "--dataset_config_name", "two")) == ["two"]


def test_max_train_samples_takes_a_sample_that_the_seed_chooses():
    def chosen(seed):
        return captions(dataset_of("--train_data_dir", PHOTOS, "--max_train_samples", 5, seed=seed))

    assert len(set(chosen(1))) == 5 and chosen(1) == chosen(1) != chosen(2)
    assert chosen(None) == chosen(0)
    assert len(dataset_of("--train_data_dir", PHOTOS, "--max_train_samples", 99)) == 15


def test_cache_dir_holds_the_prepared_table(tmp_path):
    dataset_of("--train_data_dir", PHOTOS, "--cache_dir", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter
    Image.new("RGB", (8, 4)).save(folder / "a.jpg", exif=exif)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n')
    assert dataset_of("--train_data_dir", folder)[0]["image"].size == (4, 8)


@pytest.mark.parametrize("orientation", range(10))
def test_a_photograph_is_upright_as_pillow_would_have_it_and_its_size_is_known_from_the_header(tmp_path, orientation):
    folder = copy_photos(tmp_path / "photos", 1)
    exif, file = Image.Exif(), folder / "astronaut.jpg"
    exif[0x0112] = orientation
    Image.open(file).resize((24, 16)).save(file, exif=exif)
    rows = dataset_of("--train_data_dir", folder)
    expected = ImageOps.exif_transpose(Image.open(file))
    assert np.array_equal(rows[0]["image"], expected) and rows.image_size(0) == expected.size


def test_a_turned_photograph_with_untidy_exif_data_is_used(tmp_path):
    """A short integer that is stored as text: rewriting such data fails."""
    folder = copy_photos(tmp_path / "photos", 1)
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x0100, 2, 2, b"9")
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + tags + bytes(4)
    Image.new("RGB", (8, 4)).save(folder / "astronaut.jpg", exif=exif)
    rows = dataset_of("--train_data_dir", folder)
    assert rows[0]["image"].size == rows.image_size(0) == (4, 8)


@pytest.mark.parametrize("error", [ValueError("x"), struct.error("x"), NotImplementedError("x"), KeyError("x")])
def test_whatever_a_reader_of_images_stumbles_over_names_the_sample(error):
    """All of these come out of Pillow's readers when bytes of a file are changed at random."""
    with pytest.raises(BadSampleError, match="a.jpg: the image cannot be read: '?x"), reading("a.jpg"):
        raise error


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_a_broken_image_is_named(tmp_path, content):
    folder = copy_photos(tmp_path / "photos", 2)
    file = sorted(folder.glob("*.jpg"))[0]
    file.write_bytes(file.read_bytes()[:3000] if content is None else content)
    rows = dataset_of("--train_data_dir", folder)
    with pytest.raises(BadSampleError, match=rf"{file.name} \(row \d\): the image cannot be read"):
        captions(rows)


def test_a_row_without_an_image_is_named(tmp_path):
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (5, 4)), None], "text": ["a", "b"]})
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "data" / "train.parquet"))
    rows = dataset_of("--dataset_name", tmp_path / "data")
    for read in (rows.__getitem__, rows.image_size, rows.image_digest):
        read(0)
        with pytest.raises(BadSampleError, match="^row 1: column 'image' holds no image$"):
            read(1)


def test_a_caption_that_is_no_text_is_named(tmp_path):
    folder = copy_photos(tmp_path / "photos", 2)
    rows = ({"file_name": "astronaut.jpg", "text": None}, {"file_name": "chelsea.jpg", "text": "x"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadSampleError, match=r"astronaut.jpg \(row 0\): column 'text' holds None; expected a text"):
        captions(dataset_of("--train_data_dir", folder))


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "bare" / "a.png")
    cases = {
        (): "no data: expected --train_data_dir DIR, --dataset_name NAME or --train_shards",
        ("--train_data_dir", tmp_path / "nowhere"): "--train_data_dir: '.*nowhere' is not a folder",
        (
            "--train_data_dir",
            tmp_path / "bare",
        ): "--train_data_dir: '.*bare' has no captions; expected a metadata.jsonl with a line per",
        (
            "--train_data_dir",
            PHOTOS,
            "--image_column",
            "img",
        ): "--image_column: .* has no column 'img'; it has image, text",
        ("--train_data_dir", PHOTOS, "--caption_column", "cap"): "--caption_column: .* has no column 'cap'",
        (
            "--train_data_dir",
            PHOTOS,
            "--image_column",
            "text",
        ): "--image_column: column 'text' of .* does not hold images",
        ("--dataset_name", tmp_path / "nowhere"): "--dataset_name: '.*nowhere' cannot be loaded: ",
    }
    for flags, message in cases.items():
        with pytest.raises(UserError, match=message):
            dataset_of(*flags)
