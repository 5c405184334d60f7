"""How copies of data are compared."""

import ppdiffusers_train  # noqa: F401

import shutil

import pyarrow
import pytest

from ppdiffusers_train.data.identity import described
from ppdiffusers_train.data.image_index import index_images
from ppdiffusers_train.data.shards import open_shards
from ppdiffusers_train.data.tables import ImageCaptionDataset
from ppdiffusers_train.runtime.distributed import Ranks
from tests.conftest import photo_shards

pytestmark = pytest.mark.once  # no Paddle in it


def table_of(folder, embedded):
    files = sorted(folder.glob("*.jpg"))
    images = [{"bytes": file.read_bytes(), "path": file.name} if embedded else str(file) for file in files]
    table = pyarrow.table({"image": images, "text": [["a", "b"]] * len(files)})
    return ImageCaptionDataset(table, "image", "text", str(folder))


def as_files(folder):
    return table_of(folder, False)


def embedded(folder):
    return table_of(folder, True)


def in_shards(folder):
    shards = sorted(photo_shards(folder, folder / "shards").glob("*.tar"))
    return open_shards(shards, "text", folder)


@pytest.mark.parametrize("rows_of", [as_files, embedded, in_shards])
def test_copies_are_alike_and_a_longer_picture_is_named(rows_of, photos, tmp_path):
    copies = [shutil.copytree(photos, tmp_path / name) for name in ("one", "another/place", "longer")]
    coffee = copies[2] / "coffee.jpg"
    coffee.write_bytes(coffee.read_bytes() + b" ")
    one, same, longer = map(rows_of, copies)
    for rows in (one, same, longer):
        index_images(rows, Ranks(0, 1), tmp_path / "index")
    first = described(one, 0, 7)
    assert first == described(same, 0, 7) and len(first) == 4 * len(one) == 28
    (name, size), (hashed, _) = [(key, value) for key, value in described(longer, 0, 7).items() if value != first[key]]
    assert "coffee" in name and size == first[name] + 1 and hashed == name.replace("size", "content")
    chosen = one.select([3, 1])
    assert [chosen.stored_names(0, 2)[i] for i in (0, 1)] == [one.stored_names(r, r + 1)[0] for r in (3, 1)]


def test_a_picture_that_is_not_there_has_no_size(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    rows = as_files(folder)
    (folder / "coffee.jpg").unlink()
    index_images(rows, Ranks(0, 1), tmp_path / "index")
    found = {key.partition(" (")[0]: value for key, value in described(rows, 0, 7).items()}
    assert found["size of coffee.jpg"] is None and "No such file" in found["content of coffee.jpg"]
