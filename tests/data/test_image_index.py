import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import csv
import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ppdiffusers_train.arguments import add_data_arguments
from ppdiffusers_train.arguments.parser import ArgumentParser
from ppdiffusers_train.data import image_index, inspection
from ppdiffusers_train.data.dataset import build_dataset, index_folder
from ppdiffusers_train.data.image_index import index_images
from ppdiffusers_train.errors import BadSampleError, UserError
from ppdiffusers_train.runtime.distributed import Ranks

pytestmark = pytest.mark.once  # no Paddle in it

OPENED = []  # paths of images that were opened, since `opened_by` began to listen
LISTENS = [False]


def listen(event, arguments):
    if LISTENS[0] and event == "open" and str(arguments[0]).endswith((".png", ".jpg", ".tar")):
        OPENED.append(str(arguments[0]))


sys.addaudithook(listen)


def opened_by(act):
    """(what `act` returns, the files it opened)."""
    OPENED.clear()
    LISTENS[0] = True
    try:
        return act(), sorted(OPENED)
    finally:
        LISTENS[0] = False


@pytest.fixture(autouse=True)
def times_are_told_apart(monkeypatch):
    """Files that were written a moment ago are known, too, in tests that do not ask for the opposite."""
    monkeypatch.setattr(inspection, "TICK_SECONDS", 0)


def make_image(file, shade=0, size=(6, 4)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 9, 9)).save(file)


def make_folder(folder, count=6, captions=True):
    for i in range(count):
        make_image(folder / f"{i}.png", i, (6 + i, 4))
    if captions:
        rows = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(count)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def build(folder, index_dir, *flags):
    parser = ArgumentParser()
    add_data_arguments(parser)
    kind = "--train_shards_path_or_url" if list(Path(folder).glob("*.tar")) else "--train_data_dir"
    args = parser.parse_args([f"{kind}={folder}", f"--index_dir={index_dir}", *flags])
    args.seed = 0
    return build_dataset(args), index_folder(args)


def start(folder, index_dir, *flags):
    """The rows as a run has them after its start."""
    rows, place = build(folder, index_dir, *flags)
    index_images(rows, Ranks(0, 1), place)
    return rows


def seen(rows):
    """What training sees of all rows: name, captions, size, pixels."""
    return [
        (
            os.path.basename(rows.location(i)),
            rows.captions(i),
            rows.image_size(i),
            np.asarray(rows[i]["image"]).tolist(),
        )
        for i in range(len(rows))
    ]


def test_what_has_not_changed_is_opened_at_the_first_start_only(tmp_path):
    folder, index = make_folder(tmp_path / "data"), tmp_path / "index"
    first, opened = opened_by(lambda: start(folder, index))
    assert opened == sorted(str(folder / f"{i}.png") for i in range(6))
    second, opened = opened_by(lambda: start(folder, index))
    assert opened == [] and seen(second) == seen(first)
    assert second.images_digest() == first.images_digest() and second.digest() == first.digest()
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{i}.png" for i in range(6)), "metadata.jsonl"]

    make_image(folder / "2.png", 77, (9, 9))
    third, opened = opened_by(lambda: start(folder, index))
    assert opened == [str(folder / "2.png")] and third.image_size(2) == (9, 9)
    assert third.digest() == first.digest() and third.images_digest() != first.images_digest()


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_looked_at_again(tmp_path):
    folder, index, file = make_folder(tmp_path / "data"), tmp_path / "index", tmp_path / "data" / "3.png"
    before, stat = start(folder, index).images_digest(), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    rows, opened = opened_by(lambda: start(folder, index))
    assert opened == [str(file)] and rows.images_digest() != before


def test_a_file_that_was_written_a_moment_ago_is_not_trusted_later(tmp_path, monkeypatch):
    """It may change once more, within what its times can tell apart."""
    monkeypatch.setattr(inspection, "TICK_SECONDS", 3600)
    folder, index = make_folder(tmp_path / "data", 2), tmp_path / "index"
    start(folder, index)
    assert len(opened_by(lambda: start(folder, index))[1]) == 2


def test_where_the_clock_is_set_back_nothing_is_trusted(tmp_path, monkeypatch):
    folder, index = make_folder(tmp_path / "data", 2), tmp_path / "index"
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr(inspection.time, "time", lambda: an_hour_ago)
    start(folder, index)
    assert len(opened_by(lambda: start(folder, index))[1]) == 2


def test_the_index_of_another_data_set_does_no_harm(tmp_path):
    folders = [make_folder(tmp_path / "a", 3), make_folder(tmp_path / "b", 2)]
    make_image(folders[1] / "0.png", 99, (5, 6))
    own, other = (start(folder, tmp_path / f"index-{folder.name}") for folder in folders)
    (kept,), (foreign,) = ((tmp_path / f"index-{folder.name}").iterdir() for folder in folders)
    for file in foreign.iterdir():
        (kept / file.name).unlink(missing_ok=True)  # the old one stays mapped
        shutil.copy(file, kept / file.name)
    again, opened = opened_by(lambda: start(folders[0], tmp_path / "index-a"))
    assert seen(again) == seen(own) and again.digest() == own.digest() and len(opened) == 3


def test_an_image_that_changes_while_the_run_goes_on_is_a_bad_sample_and_one_that_is_only_touched_is_not(tmp_path):
    rows = start(make_folder(tmp_path / "data"), tmp_path / "index")
    os.utime(tmp_path / "data" / "1.png")
    assert rows[1]["image"].size == (7, 4)
    make_image(tmp_path / "data" / "1.png", 200, (7, 4))
    with pytest.raises(BadSampleError, match=r"1.png \(row 1\): the image has changed since the run began"):
        rows[1]


def test_a_start_that_is_interrupted_continues_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(image_index, "PART_SECONDS", 0)
    folder, index = make_folder(tmp_path / "data", 32), tmp_path / "index"  # four are taken at a time
    rows, place = build(folder, index)
    find, asked = rows.location, []

    def location(row):
        asked.append(row)
        if len(asked) == 27:
            raise KeyboardInterrupt
        return find(row)

    rows.location = location
    with pytest.raises(KeyboardInterrupt):
        index_images(rows, Ranks(0, 1), place)
    whole, opened = opened_by(lambda: start(folder, index))
    assert 4 <= len(opened) <= 12, "five or six groups of four were finished, and are kept"
    assert whole.image_sizes().tolist() == [[6 + int(Path(whole.location(i)).stem), 4] for i in range(32)]
    assert not list(index.rglob("part-*")) and opened_by(lambda: start(folder, index))[1] == []


@pytest.mark.parametrize("damage", ["cut", "noise", "foreign"])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    folder, index = make_folder(tmp_path / "data"), tmp_path / "index"
    whole = seen(start(folder, index))
    for file in index.rglob("*.arrow"):
        content = file.read_bytes()
        if damage == "foreign":
            with pyarrow.OSFile(str(file), "wb") as target:
                pyarrow.ipc.new_file(target, pyarrow.schema({"other": pyarrow.int8()})).close()
        else:
            file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"noise" * 100)
    rows, opened = opened_by(lambda: start(folder, index))
    assert len(opened) == 6 and seen(rows) == whole
    assert opened_by(lambda: start(folder, index))[1] == []


def test_an_index_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    rows, place = build(make_folder(tmp_path / "data"), tmp_path / "file" / "index")
    lines = []
    index_images(rows, Ranks(0, 1), place, lines.append)
    assert rows.image_size(1) == (7, 4)
    assert len(lines) == 1 and "file/index" in lines[0] and "will read all images again" in lines[0]


def test_a_part_of_the_samples_is_looked_at_alone_and_the_others_are_kept(tmp_path):
    folder, index = make_folder(tmp_path / "data", 8), tmp_path / "index"
    assert len(opened_by(lambda: start(folder, index, "--max_train_samples=3"))[1]) == 3
    assert len(opened_by(lambda: start(folder, index))[1]) == 5
    assert opened_by(lambda: start(folder, index, "--max_train_samples=3"))[1] == []
    assert opened_by(lambda: start(folder, index))[1] == []


def test_shards_and_tables_are_looked_at_once_too(tmp_path):
    folder = make_folder(tmp_path / "data")
    cli.main(["pack", str(folder), str(tmp_path / "shards")])
    rows, opened = opened_by(lambda: start(tmp_path / "shards", tmp_path / "index"))
    plain = start(folder, tmp_path / "index")
    assert len(opened) == 7 and rows.images_digest() == plain.images_digest()  # once for the list, six for images
    again, opened = opened_by(lambda: start(tmp_path / "shards", tmp_path / "index"))
    assert opened == [] and again.images_digest() == plain.images_digest()
    assert {file.suffix for file in (tmp_path / "shards").iterdir()} == {".tar", ".json"}


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_a_check_decodes_an_image_once_and_training_knows_what_it_found(tmp_path, monkeypatch, capsys, layout):
    folder, index = make_folder(tmp_path / "data", 4), tmp_path / "index"
    noise = np.random.default_rng(0).integers(0, 255, [64, 64, 3], dtype=np.uint8)
    Image.fromarray(noise).save(folder / "2.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:6000])  # its header is whole
    if layout == "shards":
        names = [f"{i}.{end}" for i in range(4) for end in ("png", "txt")]
        for i in range(4):
            (folder / f"{i}.txt").write_text(f"caption {i}")
        with tarfile.open(tmp_path / "000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            [tar.add(folder / name, name) for name in names]
        folder = tmp_path / "shards"
        folder.mkdir()
        (tmp_path / "000.tar").rename(folder / "000.tar")

    def check():
        with pytest.raises(SystemExit) as stopped:
            cli.main(["check", str(folder), "--json", "--processes=1", f"--index_dir={index}"])
        document = json.loads(capsys.readouterr().out)
        return stopped.value.code, {**document, "seconds": 0}

    first, opened = opened_by(check)
    assert first[0] == 1 and len(opened) >= 4
    assert [finding["kind"] for finding in first[1]["findings"] if finding["error"]] == ["unreadable"]
    second, opened = opened_by(check)
    assert second == first and opened == []
    rows, opened = opened_by(lambda: start(folder, index))
    assert opened == [] and rows.image_size(1) == (7, 4)
    with pytest.raises(BadSampleError, match="the image cannot be read"):
        rows.image_size(2)


NAMES = st.text("ab-_ .ü", min_size=1, max_size=4).filter(
    lambda name: name.strip(". ") and name[0] != "." and name[:2] != "__"
)
PATHS = st.lists(st.tuples(st.lists(NAMES, max_size=2), NAMES), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(PATHS, st.booleans())
def test_a_folder_has_the_rows_and_the_order_that_datasets_gives_it(tmp_path_factory, paths, is_csv):
    tmp_path = tmp_path_factory.mktemp("folder")
    folder, rows = tmp_path / "data", {}
    for number, (parents, name) in enumerate(paths):
        path = "/".join([*parents, name]) + ".png"
        if (folder / path).parent.is_file() or path in rows:
            continue
        make_image(folder / path, number)
        rows[path] = f"caption {number}"
    if is_csv:
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows.items()])
    else:
        lines = (json.dumps({"file_name": name, "text": text}) for name, text in rows.items())
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "hf"))["train"]
    expected = [(row["image"]["path"], row["text"]) for row in table.cast_column("image", datasets.Image(decode=False))]
    ours, _ = build(folder, tmp_path / "index")
    assert [(ours.location(i), *ours.captions(i)) for i in range(len(ours))] == expected


def test_only_a_folder_at_the_top_is_a_split(tmp_path):
    folder = tmp_path / "data"
    for name in ("train.png", "test tube.png", "eval/a.png", "deep/test/b.png"):
        make_image(folder / name)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*.png")]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": n}) for n in names))
    rows, _ = build(folder, tmp_path / "index")
    assert [rows.captions(i) for i in range(len(rows))] == [[name] for name in sorted(names)]


def test_where_there_is_a_folder_train_only_it_is_trained_and_that_is_printed(tmp_path):
    for split in ("train", "test", "extra"):
        make_folder(tmp_path / "data" / split, 2)
    rows, _ = build(tmp_path / "data", tmp_path / "index")
    assert [rows.stored_names(i, i + 1)[0] for i in range(len(rows))] == ["train/0.png", "train/1.png"]
    reason = f"{tmp_path}/data/extra/0.png: it is not in train/, but in another folder"
    expected = f"2 images; captions: 2 of metadata; not used: 4 in a folder that is not trained, for example {reason}"
    assert rows.summary() == f"{tmp_path}/data: {expected}"
    rows, _ = build(tmp_path / "data", tmp_path / "index")
    assert rows.summary() == f"{tmp_path}/data: {expected}", "a start that reads the index knows it, too"


def test_links_are_followed_and_one_that_leads_back_ends_the_walk(tmp_path):
    folder = make_folder(tmp_path / "data", 1, captions=False)
    make_folder(tmp_path / "elsewhere", 1, captions=False)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "link" / "back").symlink_to(folder)
    (folder / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\nlink/0.png,b\n")
    rows, _ = build(folder, tmp_path / "index")
    assert [rows.captions(i) for i in range(len(rows))] == [["a"], ["b"]]


def test_metadata_is_refused_by_file_line_and_reason(tmp_path):
    folder = make_folder(tmp_path / "data", 3)
    good = (folder / "metadata.jsonl").read_text()
    cases = {
        good + '{"file_name": "3.png",': r"metadata.jsonl line 4: it is not JSON",
        good + "[1]\n\n7": r"metadata.jsonl line 4: it is not a row such as .* \(and 1 more\)",
        good + '{"text": "x"}': "metadata.jsonl line 4: it has no file_name",
    }
    for text, message in cases.items():
        (folder / "metadata.jsonl").write_text(text)
        with pytest.raises(UserError, match=f"--train_data_dir: .*{message}"):
            build(folder, tmp_path / "index")


def test_a_row_whose_file_is_missing_is_named_and_several_rows_of_an_image_are_several_captions(tmp_path):
    folder = make_folder(tmp_path / "data", 2)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0.png", "text": "again"}\n{"file_name": "gone.png", "text": "x"}\n')
    rows, _ = build(folder, tmp_path / "index")
    assert [rows.captions(i) for i in range(2)] == [["caption 0", "again"], ["caption 1"]]
    lost = f"{folder}/metadata.jsonl line 4: there is no file {folder}/gone.png"
    assert rows.summary().endswith(f"not used: 1 row of metadata, for example {lost}")
