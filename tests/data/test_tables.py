"""The same samples as a folder, as shards and as tables."""

import ppdiffusers_train  # noqa: F401

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from ppdiffusers_train.data.image_index import index_images
from ppdiffusers_train.data.tables import spellings
from ppdiffusers_train.runtime.distributed import Ranks
from tests.data.corpus.files import pixels, save, write_jsonl
from tests.data.test_corpus import open_data, status_of

pytestmark = pytest.mark.once  # no Paddle in it

texts = st.text(st.characters(codec="utf-8"), max_size=20)
samples = st.lists(
    st.tuples(texts | st.lists(texts, min_size=2, max_size=3), st.integers(1, 9)), min_size=1, max_size=5
)


def forms(folder, rows):
    """Write the images and captions in all forms. Returns the flags of each."""
    names = [f"{number}.png" for number in range(len(rows))]
    for number, (name, (_, width)) in enumerate(zip(names, rows)):
        save(folder / "photos" / name, pixels(number, (width, 4)))
    captions = [caption for caption, _ in rows]
    described = [{"file_name": name, "text": caption} for name, caption in zip(names, captions)]
    write_jsonl(folder / "photos", described)
    (folder / "list.json").write_text(
        json.dumps([{**row, "file_name": f"photos/{row['file_name']}"} for row in described])
    )
    assert (
        status_of("pack", folder / "photos", folder / "shards", "--index_dir", folder / "index", "--processes=1") == 0
    )
    if any(isinstance(caption, list) for caption in captions):
        captions = [caption if isinstance(caption, list) else [caption] for caption in captions]
    images = [{"bytes": (folder / "photos" / name).read_bytes(), "path": name} for name in names]
    parquet.write_table(
        pyarrow.table({"image": images, "text": captions}), folder / "embedded.parquet", row_group_size=2
    )
    paths = [f"photos/{name}" for name in names]
    feather.write_feather(
        pyarrow.table({"image": paths, "text": captions}), folder / "paths.feather", compression="lz4"
    )
    return {
        "folder": ["--train_data_dir", folder / "photos"],
        "shards": ["--train_shards_path_or_url", folder / "shards"],
        **{name: ["--dataset_name", folder / name] for name in ("list.json", "embedded.parquet", "paths.feather")},
    }


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=samples, chosen=st.integers(1, 5))
def test_the_form_of_the_data_changes_no_pixel_and_no_caption(rows, chosen):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seen, identities = {}, {}
        for name, flags in forms(folder, rows).items():
            data = open_data([*flags, "--cache_dir", folder / "cache", "--max_train_samples", chosen])
            index_images(data, Ranks(0, 1), folder / "index")
            read = [data[index] for index in range(len(data))]
            assert [data.image_size(index) for index in range(len(data))] == [row["image"].size for row in read]
            assert all(data.stored_sizes(0, len(data))) and data.count_captions() > 0
            seen[name] = [(row["caption"], np.asarray(row["image"]).tolist()) for row in read]
            identities[name] = data.images_digest()
        assert len(seen["folder"]) == min(chosen, len(rows))
        assert all(seen["folder"] == others for others in seen.values())
        assert len(set(identities.values())) == 1


def test_a_table_of_single_captions_has_the_identity_of_the_folder(tmp_path):
    flags = forms(tmp_path, [("one", 3), ("two", 4)])
    del flags["shards"]
    assert len({open_data([*given, "--cache_dir", tmp_path / "cache"]).digest() for given in flags.values()}) == 1


def test_paths_into_archives_are_read_in_the_ways_in_which_they_are_written():
    assert spellings("zip://in/a.png::b/c.zip") == ["b/in/a.png"]
    assert spellings("b/c.zip/in/a.png") == ["b/c.zip/in/a.png", "b/in/a.png"]
    assert spellings("in\\a.png") == ["in\\a.png", "in/a.png"]
    assert spellings("file:///in/a.png") == ["/in/a.png"]
