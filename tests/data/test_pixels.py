import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import argparse
import ast
import io
import json
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ppdiffusers_train.arguments import add_data_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.inspection import TICK_SECONDS
from ppdiffusers_train.data.pixels import decode, open_image, read, upright_size
from ppdiffusers_train.tools import inspection
from tests.data import corpus
from tests.data.corpus import pictures  # noqa: F401  (registers its cases)
from tests.data.corpus.files import pixels, save, write_jsonl
from tests.data.corpus.image_files import ADOBE_RGB, rgb_profile
from tests.data.corpus.pictures import exif, grey, on, turned

pytestmark = pytest.mark.once  # no Paddle in it

MODES = {  # of images that a format keeps without loss
    "PNG": ["1", "L", "LA", "P", "key", "RGB", "RGBA", "I;16"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB"],
    "GIF": ["L", "P"],
    "JPEG2000": ["L", "RGB", "RGBA", "I;16"],
}
OPTIONS = {"WEBP": {"lossless": True, "exact": True}}
TURNED = ("PNG", "TIFF", "WEBP")  # formats that can have an EXIF orientation
CASES = [
    "transparent_pixels_of_every_kind", "one_colour_is_transparent", "greys_of_sixteen_bits", "colours_of_sixteen_bits",
    "integers_of_thirty_two_bits", "black_and_white", "inks_with_a_profile", "wide_gamut", "greys_with_a_profile",
    "turned_images_of_every_format", "several_frames",
]  # fmt: skip


def picture(mode: str, height: int, width: int, number: int):
    """(an image, its colours [H, W, 3], its alpha [H, W])."""
    values = np.random.default_rng(number).integers(0, 256, (height, width, 4), np.uint8)
    colours, alpha = values[..., :3], np.full((height, width), 255)
    if mode == "1":
        return Image.fromarray(values[..., 0] > 127), grey(255 * (values[..., 0] > 127)), alpha
    if mode == "CMYK":
        inks = np.where(values[..., 3:] > 127, (0, 0, 0, 255), [*(255, 0, 255), 0]).astype(np.uint8)
        return Image.fromarray(inks, "CMYK"), np.where(values[..., 3:] > 127, 0, (0, 255, 0)), alpha
    if mode.startswith("I"):
        deep = values[..., 0].astype(np.uint32) * 256 + values[..., 1]
        seen = grey(np.rint(deep / 257))
        if mode == "I":
            return Image.fromarray((deep << 15).astype(np.int32)), seen, alpha
        kept = deep.astype(">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, (width, height), kept.tobytes()), seen, alpha
    if mode in ("P", "key"):
        numbers = values[..., 0] % 16
        palette = np.random.default_rng(number + 1).integers(0, 256, (16, 3), np.uint8)
        image = Image.fromarray(numbers, "P")
        image.putpalette(palette.reshape(-1).tolist())
        if mode == "key":
            image.info["transparency"] = 3
            alpha = np.where(numbers == 3, 0, 255)
        return image, palette[numbers], alpha
    if mode in ("LA", "RGBA"):
        alpha = values[..., 3]
    channels = {"L": values[..., 0], "LA": values[..., [0, 3]], "RGB": colours, "RGBA": values}[mode]
    return Image.fromarray(channels, mode), grey(values[..., 0]) if mode[0] == "L" else colours, alpha


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([(form, mode) for form, modes in MODES.items() for mode in modes]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    orientation=st.integers(1, 8),
    background=st.tuples(*[st.integers(0, 255)] * 3),
    number=st.integers(0, 1000),
)
def test_pixels_are_those_that_the_formats_define_and_the_size_is_known_from_the_header(
    kind, size, orientation, background, number
):
    form, mode = kind
    image, colours, alpha = picture(mode, *size, number)
    file, orientation = io.BytesIO(), orientation if form in TURNED else 1
    more = {"exif": exif(orientation)} if form in TURNED else {}
    if "transparency" in image.info:
        more["transparency"] = image.info["transparency"]
    image.save(file, form, **OPTIONS.get(form, {}), **more)
    seen = decode(file.getvalue(), "#{:02x}{:02x}{:02x}".format(*background))
    expected = turned(on(colours, alpha, background), orientation)
    assert seen.mode == "RGB" and np.array_equal(seen, expected)
    with open_image(file.getvalue()) as opened:
        assert upright_size(opened) == seen.size


def rows_of(*flags):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args([*map(str, flags), "--background_color=tomato"])
    args.seed = 0
    return build_dataset(args)


@pytest.mark.filterwarnings("error:Palette images")
def test_a_folder_its_shards_and_a_table_of_its_files_give_the_same_pixels(tmp_path):
    for name in CASES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        corpus.CASES[name](tmp_path / "photos" / name)
    cache = ["--cache_dir", tmp_path / "cache"]
    folder = rows_of("--train_data_dir", tmp_path / "photos", *cache)
    command = ["pack", tmp_path / "photos", tmp_path / "shards", "--processes=1", *cache]
    cli.main(list(map(str, command)))
    shards = rows_of("--train_shards_path_or_url", tmp_path / "shards", *cache)
    stored = [{"bytes": folder.stored_image(index), "path": None} for index in range(len(folder))]
    texts = [folder.captions(index)[0] for index in range(len(folder))]
    table = datasets.Dataset.from_dict({"image": stored, "text": texts}).cast_column("image", datasets.Image())
    (tmp_path / "table").mkdir()
    table.to_parquet(str(tmp_path / "table" / "train.parquet"))
    table = rows_of("--dataset_name", tmp_path / "table", *cache)
    assert len(folder) == len(shards) == len(table) > 60
    for index in range(len(folder)):
        expected = folder[index]
        for rows in (shards, table):
            row = rows[index]
            assert row["caption"] == expected["caption"] and np.array_equal(row["image"], expected["image"])


def test_the_background_stays_with_chosen_rows(tmp_path):
    save(tmp_path / "data" / "a.png", np.zeros((2, 2, 4), np.uint8))
    write_jsonl(tmp_path / "data", [{"file_name": "a.png", "text": "x"}])
    rows = rows_of("--train_data_dir", tmp_path / "data", "--cache_dir", tmp_path / "cache")
    for chosen in (rows, rows.select([0])):
        assert chosen[0]["image"].getpixel((0, 0)) == (255, 99, 71)


def test_a_check_remarks_on_what_training_changes_also_when_it_knows_the_images(tmp_path, capsys, monkeypatch):
    array = pixels(0, (40, 30))
    options = {
        "animated.gif": {"save_all": True, "append_images": [Image.fromarray(array)]},
        "inks.png": {"icc_profile": b"broken"},
        "wide.png": {"icc_profile": rgb_profile("a wide gamut", ADOBE_RGB, 2.2)},
    }  # fmt: skip
    images = {
        "a.png": array, "animated.gif": array[::-1], "clear.png": np.dstack([array, np.zeros((30, 40), np.uint8)]),
        "deep.png": np.uint16(array[..., 0]) * 257, "half.png": np.dstack([array, array[..., 0]]), "inks.png": array,
        "long.png": pixels(1, (90, 10)), "opaque.png": np.dstack([array, np.full((30, 40), 255, np.uint8)]),
        "wide.png": array,
    }  # fmt: skip
    for name, image in images.items():
        save(tmp_path / "data" / name, image, **options.get(name, {}))
    Image.new("CMYK", (40, 30)).save(tmp_path / "data" / "cmyk.jpg")
    Image.new("LAB", (40, 30)).save(tmp_path / "data" / "lab.tif", icc_profile=b"broken")
    write_jsonl(tmp_path / "data", [{"file_name": name, "text": name} for name in (*images, "cmyk.jpg", "lab.tif")])
    expected = {
        "transparent": ["clear.png", "half.png"], "deep": ["deep.png"], "profile": ["lab.tif", "wide.png"],
        "bad_profile": ["inks.png"], "ink": ["cmyk.jpg"], "frames": ["animated.gif"], "long": ["long.png"],
    }  # fmt: skip
    command = ["check", tmp_path / "data", "--processes=1", "--resolution=1", "--json", "--index_dir", tmp_path / "i"]
    time.sleep(2 * TICK_SECONDS)  # what has changed just now is not trusted
    for _ in range(2):
        cli.main(list(map(str, command)))
        found = {kind["kind"]: kind for kind in json.loads(capsys.readouterr().out)["findings"]}
        assert not any(kind["error"] for kind in found.values())
        for kind, names in expected.items():
            texts = found.pop(kind)["texts"]
            assert [text.partition(" (row")[0].rpartition("/")[2] for text in texts] == names
            assert kind != "profile" or texts[1].endswith(": a wide gamut")
        assert set(found) <= {"duplicate"}
        monkeypatch.setattr(inspection, "inspect", None)  # the images are known now


def test_images_of_phones_are_read_where_the_package_is_there():
    pytest.importorskip("pillow_heif")
    array, file = np.full((32, 48, 3), (200, 100, 50), np.uint8), io.BytesIO()
    Image.fromarray(array).save(file, "HEIF", quality=95)
    image, remarks = read(file.getvalue())
    assert np.abs(np.int16(image) - array).max() < 5 and not remarks


def test_a_png_that_is_cut_short_is_noticed_with_its_header():
    file = io.BytesIO()
    Image.fromarray(pixels(0, (90, 90))).save(file, "PNG")
    with open_image(file.getvalue()[:9000]) as cut, pytest.raises(OSError, match="truncated"):
        upright_size(cut)


@pytest.mark.once
def test_the_most_common_formats_are_tried_first():
    """Pillow tries one after the other, and takes longer to refuse a format than to read a header."""
    code = "from ppdiffusers_train.data.pixels import extensions; from PIL import Image; extensions(); print(Image.ID)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(done.stdout)[:6]) == {"BMP", "DIB", "GIF", "JPEG", "PPM", "PNG"}
