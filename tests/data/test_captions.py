"""Captions of a folder: from whatever they are read, they are the same."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import csv
import json
import os
import shutil
import sys

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppdiffusers_train.data import text_files
from ppdiffusers_train.data.order import order_samples
from ppdiffusers_train.errors import UserError
from tests.data.test_image_folder import dataset_of
from tests.data.test_image_index import make_image

pytestmark = pytest.mark.once  # no Paddle in it

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters='/\\\0."*?', exclude_categories=["Cc", "Cs"]),
    min_size=1,
    max_size=8,
)
CAPTIONS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=30).map(str.strip)


def seen(rows, folder):
    """(name of the image, captions) of all rows."""
    found = [(rows.stored_names(i, i + 1)[0], rows.captions(i)) for i in range(len(rows))]
    return [(str(name).removeprefix(f"{folder}/"), captions) for name, captions in found]


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.tuples(NAMES, NAMES).map("/".join), CAPTIONS, min_size=1, max_size=5))
def test_text_files_metadata_shards_and_tables_give_the_same_captions_in_the_same_order(tmp_path_factory, captions):
    tmp_path = tmp_path_factory.mktemp("captions")
    captions = {name: text or "x" for name, text in captions.items() if name[0] not in "_"}
    folder, cache = tmp_path / "data", ["--cache_dir", tmp_path / "cache"]
    for number, name in enumerate(captions):
        make_image(folder / f"{name}.png", number)
        (folder / f"{name}.txt").write_text(captions[name], encoding="utf-8", newline="")
    if not captions:
        return
    rows = dataset_of("--train_data_dir", folder, *cache)
    expected = seen(rows, folder)
    assert sorted(expected) == sorted((f"{name}.png", [text]) for name, text in captions.items())

    cli.main(["pack", str(folder), str(tmp_path / "shards"), "--processes=1"])
    packed = dataset_of("--train_shards_path_or_url", tmp_path / "shards", *cache)
    assert [packed.captions(i) for i in range(len(packed))] == [texts for _, texts in expected]

    images = [str(folder / name) for name, _ in expected]
    table = datasets.Dataset.from_dict({"image": images, "text": [text for _, (text,) in expected]})
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "table" / "train.parquet"))
    table = dataset_of("--dataset_name", tmp_path / "table", *cache)
    assert [table.captions(i) for i in range(len(table))] == [texts for _, texts in expected]

    for text in folder.rglob("*.txt"):
        text.unlink()
    lines = [json.dumps({"file_name": name, "text": text}) for name, (text,) in expected]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert seen(dataset_of("--train_data_dir", folder, *cache), folder) == expected
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *((name, text) for name, (text,) in expected)])
    assert seen(dataset_of("--train_data_dir", folder, *cache), folder) == expected


@pytest.fixture
def folder(tmp_path):
    """Four images with text files, in two sub-folders."""
    for number, name in enumerate(("cats/a", "cats/b", "cats/wild/c", "dogs/d")):
        make_image(tmp_path / "data" / f"{name}.png", number)
        (tmp_path / "data" / f"{name}.txt").write_text(f"caption of {name}")
    return tmp_path / "data"


READ = []
sys.addaudithook(lambda event, values: event == "open" and str(values[0]).endswith(".txt") and READ.append(values[0]))


def read_by(act):
    """(what `act` returns, how many text files it opened)."""
    READ.clear()
    return act(), len(READ)


def test_a_text_file_is_opened_once_and_one_that_has_changed_once_more(folder, tmp_path):
    def start(*flags):
        rows = dataset_of("--train_data_dir", folder, "--index_dir", tmp_path / "index", *flags)
        return [rows.captions(i)[0] for i in range(len(rows))]

    first, opened = read_by(start)
    assert opened == 4 and first[1] == "caption of cats/b"
    assert read_by(start) == (first, 0)
    (folder / "cats" / "b.txt").write_text("another one, yes!")
    assert read_by(start) == ([first[0], "another one, yes!", *first[2:]], 1)
    make_image(folder / "e.png")
    (folder / "e.txt").write_text("new")
    assert read_by(start)[1] == 1
    assert read_by(lambda: start("--caption_separator= of "))[1] == 0
    (folder / "cats" / "b.txt").unlink()
    assert read_by(lambda: start("--caption=the same"))[0][1] == "the same"


def test_a_text_file_that_changes_within_a_tick_of_the_clock_is_noticed(folder, tmp_path, monkeypatch):
    """What was read belongs to the stamp, because reading waits until another change would show."""
    slept = []
    monkeypatch.setattr(text_files.time, "sleep", slept.append)
    (folder / "cats" / "b.txt").write_text("changed")
    dataset_of("--train_data_dir", folder, "--index_dir", tmp_path / "index")
    assert len(slept) == 1 and 0 < slept[0] <= text_files.TICK_SECONDS


class Job:
    buckets = []


def epoch_of(rows, job=Job, block=1):
    order = order_samples(job, rows, 3, block, print)
    return [order.row(position) for position in range(order.size)], order


@pytest.mark.parametrize(
    "words, times",
    [
        (["3"], [3, 3, 3, 3]),
        (["cats=3", "dogs=2"], [3, 3, 3, 2]),
        (["2", "cats/wild/=5", "./cats=1"], [1, 1, 5, 2]),
        (["cats\\wild=4"], [1, 1, 4, 1]),
    ],
)
def test_repeats_are_what_an_epoch_has(folder, words, times):
    rows = dataset_of("--train_data_dir", folder, "--repeats", *words)
    epoch, order = epoch_of(rows)
    assert np.bincount(epoch).tolist() == times and order.size == sum(times)
    assert len(rows) == 4 and f"an epoch has {sum(times)} samples" in rows.summary()
    second = [order.row(order.size + position) for position in range(order.size)]
    assert sorted(second) == sorted(epoch) and second != epoch
    fewer = dataset_of("--train_data_dir", folder, "--repeats", *words, "--max_train_samples", 2, seed=1)
    assert np.bincount(epoch_of(fewer)[0]).sum() == fewer.times.sum() == sum(times[i] for i in fewer.chosen)


def test_samples_of_a_bucket_stay_together_with_repeats(folder):
    make_image(folder / "dogs" / "d.png", 0, (4, 12))
    job = type("Job", (), {"buckets": [(64, 64), (192, 64)]})
    rows = dataset_of("--train_data_dir", folder, "--repeats", "cats=3", "dogs=8")
    epoch, order = epoch_of(rows, job, block=4)
    assert np.bincount(epoch).tolist() == [3, 3, 3, 8]
    blocks = [{order.bucket(start + i) for i in range(4)} for start in (0, 4, 8, 12)]
    assert all(len(block) == 1 for block in blocks) and {0} in blocks and {1} in blocks


@pytest.mark.parametrize(
    "words, message",
    [
        (["birds=2"], r"--repeats birds=2: '.*data' has no images in birds/; it has some in cats, cats/wild, dogs"),
        (["cat=2"], "has no images in cat/"),
        (["cats=2", "cats/=3"], "--repeats cats/=3: this folder had a number before"),
        (["2", "3"], "--repeats 3: all images had a number before"),
        (["../data=2"], "has no images in ../data/"),
        (["dogs=99999999999999999999"], "an epoch may have at most 4,294,967,296 samples"),
    ],
)
def test_repeats_of_no_folder_are_refused(folder, words, message):
    with pytest.raises(UserError, match=message):
        dataset_of("--train_data_dir", folder, "--repeats", *words)


@pytest.mark.parametrize("word", ["0", "-1", "cats=0", "cats=", "many", "cats=1.5", ""])
def test_repeats_of_no_number_are_refused(folder, word, capsys):
    with pytest.raises(SystemExit):
        dataset_of("--train_data_dir", folder, f"--repeats={word}")
    assert "is not a whole number above 0" in capsys.readouterr().err


def test_flags_of_a_folder_are_refused_with_other_data(folder, tmp_path):
    table = tmp_path / "table" / "rows.csv"
    table.parent.mkdir()
    table.write_text(f"image,text\n{folder}/dogs/d.png,x\n")
    for flag in ("--caption=x", "--caption_separator=;", "--repeats=2"):
        for source in (["--dataset_name", table.parent], ["--train_shards_path_or_url", folder]):
            with pytest.raises(UserError, match=f"{flag.partition('=')[0]}: has an effect only on a folder of images"):
                dataset_of(*source, flag)


def test_check_counts_what_an_epoch_has_and_knows_a_folder_with_text_files(folder, capsys):
    (folder / "notes.csv").write_text("a,b\n")
    cli.main(["check", str(folder), "--json", "--resolution=1", "--processes=1", "--repeats", "2", "dogs=5"])
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["samples"], document["captions"]) == ("image folder", 4, 4)
    assert (
        "4 images; captions: 4 of text files; an epoch has 11 samples; not used: 1 other file" in document["notes"][1]
    )


def test_archives_are_unpacked_unless_there_are_text_files_beside_images(folder, tmp_path):
    shutil.make_archive(str(folder / "old"), "zip", folder)
    assert len(dataset_of("--train_data_dir", folder)) == 4
    archived = tmp_path / "archived"
    archived.mkdir()
    for text in folder.rglob("*.txt"):
        text.unlink()
    os.remove(folder / "old.zip")
    rows = [{"file_name": str(path.relative_to(folder)), "text": path.stem} for path in sorted(folder.rglob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.make_archive(str(archived / "photos"), "zip", folder)
    rows = dataset_of("--train_data_dir", archived, "--cache_dir", tmp_path / "cache")
    assert sorted(rows.captions(i)[0] for i in range(len(rows))) == ["a", "b", "c", "d"]
