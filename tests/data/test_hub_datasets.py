"""Datasets of the hub whose images are files, in archives, or elsewhere in the repository of a table."""

import ppdiffusers_train  # noqa: F401

import io
import json
import zipfile

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pytest
from huggingface_hub.utils import reset_sessions
from pyarrow import parquet

from ppdiffusers_train.errors import UserError
from tests.data.corpus.files import pixels
from tests.data.corpus.tables import png
from tests.data.test_corpus import open_data
from tests.fake_hub import FakeHub
from tests.reporting.test_hub import use_endpoint

pytestmark = pytest.mark.once  # no Paddle in it


@pytest.fixture
def hub(monkeypatch):
    with FakeHub() as hub:
        use_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        go_offline(monkeypatch, False)
        yield hub
    reset_sessions()


def go_offline(monkeypatch, is_offline):
    """What HF_HUB_OFFLINE does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
    reset_sessions()


def as_zip(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def rows_of(column):
    rows = [{column: f"{number}.png", "text": f"caption {number}"} for number in range(2)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(**columns):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


IMAGES = {f"{number}.png": png(number) for number in range(2)}
REPOSITORIES = {
    "images": {**IMAGES, "metadata.jsonl": rows_of("file_name")},
    "zip": {"photos.zip": as_zip({**IMAGES, "metadata.jsonl": rows_of("file_name")})},
    "zip_beside_metadata": {"photos.zip": as_zip(IMAGES), "metadata.jsonl": rows_of("file_name")},
    "zip_beside_jsonl": {"photos.zip": as_zip(IMAGES), "rows.jsonl": rows_of("image")},
    "zip_beside_parquet": {
        "photos.zip": as_zip(IMAGES),
        "data/train-00000-of-00001.parquet": as_parquet(
            image=["zip://0.png::photos.zip", "1.png"], text=["caption 0", "caption 1"]
        ),
    },
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_images_in_any_form_are_those_of_the_repository(hub, tmp_path, monkeypatch, name):
    hub.files["owner/tiny"] = {"README.md": b"---\nlicense: mit\n---\n", **REPOSITORIES[name]}
    flags = ["--dataset_name", "owner/tiny", "--cache_dir", tmp_path]
    for is_offline in (False, True):
        go_offline(monkeypatch, is_offline)
        rows = open_data(flags)
        assert [rows[index]["caption"] for index in range(len(rows))] == ["caption 0", "caption 1"]
        assert all(np.array_equal(rows[index]["image"], pixels(index)) for index in range(2))


def test_a_script_is_never_run_and_no_question_is_asked(hub, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    hub.files["owner/tiny"] = {"tiny.py": b"raise SystemExit('this code has run')", **REPOSITORIES["images"]}
    with pytest.raises(UserError, match="'owner/tiny' is loaded by a script of its own, which is never run here"):
        open_data(["--dataset_name", "owner/tiny", "--cache_dir", tmp_path])
    assert not asked
