"""`ppdiffusers-train check` on data that is broken in every way that it knows, against what training does with it."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ppdiffusers_train.arguments import add_data_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import BadSampleError, UserError
from ppdiffusers_train.models.text import load_tokenizer
from ppdiffusers_train.tools.caption_length import fewest_tokens
from ppdiffusers_train.tools.check import KINDS, describe_shards
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from tests.conftest import PHOTOS, copy_photos

pytestmark = pytest.mark.once  # no Paddle in it


def run(capsys, source, *flags):
    """(exit status, what `check --json` printed)."""
    argv = ["check", str(source), "--json", "--processes=1", *map(str, flags)]
    capsys.readouterr()  # what opening the data for training has printed
    try:
        cli.main(argv)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    return status, json.loads(capsys.readouterr().out)


def found(document):
    """{kind: texts} of a check's document."""
    assert all(finding["count"] == len(finding["texts"]) for finding in document["findings"])
    return {finding["kind"]: finding["texts"] for finding in document["findings"]}


def refused(capsys, *argv):
    """The one line with which a mistake in the flags ends."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, argv)))
    output = capsys.readouterr()
    assert stopped.value.code == 2 and output.out == ""
    return output.err.splitlines()[-1]


def png(size=(20, 16), color=0):
    """A PNG file's bytes; another colour is another image."""
    file = io.BytesIO()
    Image.new("RGB", size, (color, color, color)).save(file, "PNG")
    return file.getvalue()


def make_folder(folder, files, rows):
    """A folder of files {name: bytes} with a metadata.jsonl of `rows`, each a dictionary or a line as it is."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def row(name, text="a caption"):
    return {"file_name": name, "text": text}


def make_tar(file, members):
    """A tar file of (name, bytes)."""
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def training_data(*flags):
    """What training would read."""
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(list(map(str, flags)))
    args.seed = 0
    return build_dataset(args)


def bad_samples(dataset):
    """The messages about samples that training could not use."""
    messages = []
    for index in range(len(dataset)):
        try:
            dataset[index]
        except BadSampleError as error:
            messages.append(str(error))
    return messages


def test_the_photographs_are_fine_and_at_512_pixels_small(capsys):
    status, document = run(capsys, PHOTOS, "--resolution=300")
    assert (status, document["findings"], document["kind"]) == (0, [], "image folder")
    assert (document["samples"], document["captions"], document["status"]) == (15, 15, 0)
    assert document["sizes"] == {"smallest": [384, 303], "median": [384, 384], "largest": [576, 384]}
    status, document = run(capsys, PHOTOS)
    assert status == 0 and list(found(document)) == ["small"] and len(found(document)["small"]) == 15
    assert document["findings"][0]["training"] == "enlarges them"


def test_images_that_training_cannot_read_are_those_of_the_check(tmp_path, capsys, monkeypatch):
    folder, photograph = tmp_path / "photos", io.BytesIO()
    Image.open(PHOTOS / "astronaut.jpg").resize((30, 30)).save(photograph, "JPEG")
    whole = photograph.getvalue()
    files = {
        "a.jpg": whole[:-60], "b.png": b"", "c.png": b"no image", "d.png": png((20, 30)),
        "e.png": png((40, 30)), "f.png": png((50, 50)), "g.png": png((20, 30))[:-30],
    }  # fmt: skip
    make_folder(folder, files, map(row, files))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    status, document = run(capsys, folder, "--resolution=20")
    assert status == 1 and set(found(document)) == {"unreadable", "bomb", "large"}
    assert [text.split(" ")[0] for text in found(document)["unreadable"]] == [
        str(folder / name) for name in ("a.jpg", "b.png", "c.png", "g.png")
    ]
    assert "image file is truncated" in found(document)["unreadable"][0]
    assert found(document)["bomb"][0].startswith(f"{folder}/f.png (row 5): Image size (2500 pixels) exceeds limit")
    assert found(document)["large"] == [f"{folder}/e.png (row 4): 40 x 30"]
    assert document["sizes"] == {"smallest": [20, 30], "median": [40, 30], "largest": [40, 30]}
    assert len(bad_samples(training_data("--train_data_dir", folder))) == 5


def test_sizes_are_those_of_the_upright_image(tmp_path, capsys):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    folder = make_folder(tmp_path / "photos", {"a.jpg": file.getvalue()}, [row("a.jpg")])
    assert run(capsys, folder)[1]["sizes"]["median"] == [4, 8]


def test_captions_that_training_cannot_use_are_those_of_the_check(tmp_path, capsys):
    files = {f"{number}.png": png(color=number) for number in range(5)}
    files["3.png"] = b"broken, too"
    captions = [["one", "two"], ["one", None], [], None, ["", " \n", "x " * 80]]
    folder = make_folder(tmp_path / "photos", files, map(row, files, captions))
    status, document = run(capsys, folder, "--resolution=16")
    assert status == 1 and document["captions"] == 5
    assert found(document) == {
        "bad_caption": bad_samples(training_data("--train_data_dir", folder)),
        "empty_caption": [f"{folder}/4.png (row 4): ''", f"{folder}/4.png (row 4): ' \\n'"],
        "long_caption": [f"{folder}/4.png (row 4): 82 tokens"],
        "unreadable": [f"{folder}/3.png (row 3): it is no image of a known format"],
    }
    assert len(found(document)["bad_caption"]) == 3


def test_empty_and_long_captions_and_copies_are_remarks(tmp_path, capsys):
    folder = make_folder(
        tmp_path / "photos", {"a.png": png(), "b.png": png(color=1), "c.png": png()},
        [row("a.png", ""), row("b.png", "word " * 99), row("c.png")],
    )  # fmt: skip
    status, document = run(capsys, folder, "--resolution=16")
    assert status == 0 and not bad_samples(training_data("--train_data_dir", folder))
    assert found(document)["duplicate"] == [f"{folder}/c.png (row 2): the same file as {folder}/a.png (row 0)"]
    assert set(found(document)) == {"empty_caption", "long_caption", "duplicate"}
    assert "a lower bound" in document["notes"][0]
    assert document["notes"][1:] == [f"{folder}: 3 images; captions: 3 of metadata"]


FOLDERS = {
    "bad_metadata": ({"a.png": png()}, [row("a.png"), "{broken"], "metadata.jsonl line 2: it is not JSON"),
    "bad_metadata, unnamed": ({"a.png": png()}, [row("a.png"), {"text": "b"}], "line 2: it has no file_name"),
    "bad_metadata, a list": ({"a.png": png()}, [row("a.png"), "[1]"], "line 2: it is not a row such as"),
    "no_samples": ({"notes.txt": b"hello"}, [row("a.png")], "photos"),
    "refused, column": ({"a.png": png()}, [{"file_name": "a.png"}], "--caption_column: "),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_training_refuses_as_a_whole_is_looked_through_all_the_same(tmp_path, capsys, kind):
    files, rows, text = FOLDERS[kind]
    folder = make_folder(tmp_path / "photos", files, rows)
    with pytest.raises(UserError) as refusal:
        training_data("--train_data_dir", folder)
    status, document = run(capsys, folder)
    assert status == 1 and found(document)["refused"] == [str(refusal.value)]
    assert text in found(document)[kind.split(",")[0]][0]
    described = {row.get("file_name") for row in rows if isinstance(row, dict)}
    assert document["samples"] == len(described & set(files))


LOST = {
    "there is no file": ({"a.png": png()}, [row("a.png"), row("b.png")]),
    "is no image to the loader": ({"a.png": png(), "b.svg": b"?"}, [row("a.png"), row("b.svg")]),
    "has metadata that is nearer": (
        {"a/a.png": png(), "a/metadata.jsonl": json.dumps(row("a.png")).encode()}, [row("a/a.png")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", LOST)
def test_a_row_of_metadata_that_training_leaves_out_without_a_word_is_an_error(tmp_path, capsys, reason):
    folder = make_folder(tmp_path / "photos", *LOST[reason])
    assert len(training_data("--train_data_dir", folder)) == 1
    status, document = run(capsys, folder)
    texts = found(document)["lost_row"]
    assert status == 1 and len(texts) == 1 and reason in texts[0] and "metadata.jsonl line" in texts[0]


def test_metadata_of_subfolders_and_in_csv_is_read_as_training_reads_it(tmp_path, capsys):
    files = {"a.png": png(), "s/b.png": png(color=1), "s/t/c.png": png(color=2)}
    folder = make_folder(tmp_path / "photos", files, [])
    (folder / "metadata.jsonl").rename(folder / "metadata.csv")
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\n")
    (folder / "s" / "metadata.csv").write_text('file_name,text\nb.png,"two,\nthree"\nt/c.png,\n')
    bad = [f"{folder}/s/t/c.png (row 2): column 'text' holds None; expected a text or several"]
    status, document = run(capsys, folder, "--resolution=16")
    assert (status, document["samples"], document["captions"], found(document)) == (1, 3, 2, {"bad_caption": bad})
    (folder / "s" / "d.png").write_bytes(png(color=3))
    document = run(capsys, folder, "--resolution=16")[1]
    bad = [f"{folder}/s/d.png (row 2): it has no caption: no row of metadata is about it, and no text file beside it "
           "has its name", bad[0].replace("row 2", "row 3")]  # fmt: skip
    assert (document["samples"], document["captions"], found(document)) == (4, 2, {"bad_caption": bad})
    assert document["notes"][1].endswith(f"not used: 2 without caption, for example {folder}/s/d.png")


def test_images_that_training_takes_for_other_splits_are_named(tmp_path, capsys):
    files = {"train/a.png": png(), "test/b.png": png(color=1)}
    folder = make_folder(tmp_path / "apart", files, map(row, files))
    assert len(training_data("--train_data_dir", folder)) == 1
    status, document = run(capsys, folder, "--resolution=16")
    assert status == 0 and found(document) == {
        "other_split": [f"{folder}/test/b.png: it is not in train/, but in another folder"]
    }
    files = {"express train.png": png(), "cat.png": png(color=1), "test tube.png": png(color=2)}
    folder = make_folder(tmp_path / "mixed", files, map(row, files))
    assert len(training_data("--train_data_dir", folder)) == 3, "a name of a file is no split"
    assert run(capsys, folder, "--resolution=16")[1]["findings"] == []


def test_captions_may_be_of_mixed_types_and_one_that_is_no_text_is_a_bad_sample(tmp_path, capsys):
    files = {"a.png": png(), "b.png": png(color=1), "c.png": png(color=2)}
    folder = make_folder(tmp_path / "photos", files, [row("a.png"), row("b.png", ["x", "y"]), row("c.png", 3)])
    assert training_data("--train_data_dir", folder).captions(1) == ["x", "y"]
    status, document = run(capsys, folder, "--resolution=16")
    bad = {"bad_caption": [f"{folder}/c.png (row 2): column 'text' holds 3; expected a text or several"]}
    assert (status, document["captions"], found(document)) == (1, 3, bad)


def test_hidden_files_concern_nobody(tmp_path, capsys):
    files = {"a.png": png(), ".b.png": b"", ".git/c.png": b"", "__pycache__/d.png": b"", "notes.txt": b""}
    folder = make_folder(tmp_path / "photos", files, [row("a.png")])
    assert run(capsys, folder, "--resolution=16")[1]["findings"] == []


def test_every_problem_of_a_shard_is_one_that_training_has(tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    good = [("0.png", png()), ("0.txt", b"a caption"), ("1.png", png(color=1)), ("1.json", b'{"text": ["a", ""]}')]
    bad = [
        ("2.png", png()), ("3.txt", b"no image"), ("4.png", png()), ("4.json", b"{}"), ("5.png", png()),
        ("5.txt", b"\xff"), ("6.png", b"broken"), ("6.txt", b"x"), ("../7.png", png()), ("../7.txt", b"x"),
        ("0.png", png()), ("0.txt", b"again"), ("8.svg", b"?"), ("8.txt", b"x"),
    ]  # fmt: skip
    make_tar(shards / "p-000.tar", [*good, *bad])
    whole = make_tar(shards / "p-001.tar", [("9.png", png(color=2)), ("9.txt", b"x"), *good])
    whole.write_bytes(whole.read_bytes()[:3000])
    (shards / "p-002.tar").write_bytes(b"no tar")
    dataset = training_data("--train_shards_path_or_url", shards)
    for source in (shards, shards / "p-{000..002}.tar", shards / "p-*.tar"):
        status, document = run(capsys, source, "--resolution=16", "--ranks=3", "--workers=2")
        texts = found(document)
        assert status == 1 and document["samples"] == len(dataset) and document["kind"] == "tar shards"
        assert len(texts["bad_sample"]) == 9 and len(texts["unreadable"]) == 1
        assert [text.split("p-00")[1][0] for text in texts["bad_sample"]].count("0") == 7
        assert len(bad_samples(dataset)) == 10 and set(texts["bad_sample"]) < set(bad_samples(dataset))
        assert document["captions"] == 5 and len(texts["empty_caption"]) == 1
        assert document["notes"][1:] == [describe_shards(3, 3, 2)]
    status, document = run(capsys, shards / "p-001.tar")
    assert (document["samples"], len(found(document)["bad_sample"])) == (2, 1)


@pytest.mark.parametrize(
    "shards, ranks, said",
    [
        (32, 4, "read in 8 lanes, of which each rank reads 2 of them"),
        (32, 16, "read in 8 lanes, of which each rank reads 1 of them"),
        (32, 3, "read in 8 lanes, of which each rank reads all of them"),
        (3, 3, "read in 3 lanes, of which each rank reads 1 of them"),
    ],
)
def test_lanes_are_shared_by_the_ranks_that_divide_them(shards, ranks, said):
    assert said in describe_shards(shards, ranks, 1)


def test_a_dataset_of_the_hub_is_checked_too(tmp_path, capsys):
    data = tmp_path / "data"
    images = [Image.new("RGB", (20, 16), color) for color in ("red", "blue", "red")]
    table = datasets.Dataset.from_dict({"picture": [*images, None], "words": ["one", None, "three", "four"]})
    table.cast_column("picture", datasets.Image()).to_parquet(str(data / "train.parquet"))
    columns = ["--image_column=picture", "--caption_column=words"]
    status, document = run(capsys, data, *columns, "--resolution=16", f"--cache_dir={tmp_path / 'cache'}")
    assert status == 1 and (document["kind"], document["samples"], document["captions"]) == ("dataset", 4, 3)
    assert found(document) == {
        "bad_caption": ["row 1: column 'words' holds None; expected a text or several"],
        "unreadable": ["row 3: column 'picture' holds no image"],
        "duplicate": ["row 2: the same file as row 0"],
    }


# Tokens.


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A pipeline's folder as far as its tokenizer goes: a token for each byte."""
    folder = tmp_path_factory.mktemp("pipeline")
    build_tokenizer(folder / "tokenizer")
    return folder


def test_with_a_tokenizer_tokens_are_counted_exactly(tmp_path, capsys, tokenizer_folder):
    files = {f"{number}.png": png(color=number) for number in range(3)}
    folder = make_folder(tmp_path / "photos", files, map(row, files, ["x" * 75, "x" * 76, "图" * 26]))
    assert run(capsys, folder, "--resolution=16")[1]["findings"] == []
    for place in (tokenizer_folder, tokenizer_folder / "tokenizer"):
        status, document = run(capsys, folder, "--resolution=16", f"--tokenizer={place}")
        assert status == 0 and len(document["notes"]) == 1
        assert found(document) == {
            "long_caption": [f"{folder}/1.png (row 1): 78 tokens", f"{folder}/2.png (row 2): 80 tokens"]
        }


WORDS = [
    "cat",
    "it's",
    "DON'T",
    "图像",
    "a1b2",
    "...",
    "&amp;",
    "it’s",
    "café",
    "\n",
    "👍🏽",
    "#!",
    "٣",
    "ｆ",
    "cafÃ©",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, "--tokenizer")


@example(text="it’s " * 60)  # a curly apostrophe is mended first, and then belongs to the s
@example(text="cafÃ© " * 60)
@settings(deadline=None)
@given(text=st.lists(st.sampled_from(WORDS) | st.text(max_size=5), min_size=1, max_size=120).map(" ".join))
def test_the_count_of_words_never_says_that_a_caption_is_long_that_is_not(tokenizer, text):
    """Against the library's own splitting, whose pieces become at least one token each."""
    pieces = len(tokenizer.pat.findall(" ".join(tokenizer.fix_text(text).split()).lower()))
    assert fewest_tokens(text) <= 77 or fewest_tokens(text) <= pieces + 2
    if text.isascii() and "&" not in text and text.isprintable():
        assert fewest_tokens(text) == pieces + 2


# The command.


def test_two_processes_find_what_one_finds(tmp_path, capsys):
    folder = copy_photos(tmp_path / "photos", 15)
    (folder / "moon.jpg").write_bytes((folder / "moon.jpg").read_bytes()[:4000])
    (folder / "coins.jpg").write_bytes((folder / "china.jpg").read_bytes())
    one = run(capsys, folder)
    two = run(capsys, folder, "--processes=2")
    one[1].pop("seconds"), two[1].pop("seconds")
    assert one == two and set(found(one[1])) == {"unreadable", "small", "duplicate"}


def test_people_get_a_table_and_a_line_that_sums_it_up(tmp_path, capsys):
    folder = copy_photos(tmp_path / "photos", 7)
    (folder / "chelsea.jpg").write_bytes(b"broken")
    with pytest.raises(SystemExit):
        cli.main(["check", str(folder), "--processes=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["errors", "what", "training"] and lines[3] == ""
    training = "stops at the first; --max_bad_samples N skips up to N"
    assert " ".join(lines[1].split()) == f"1 images that cannot be read {training}"
    assert lines[2].strip().startswith(f"{folder}/chelsea.jpg (row 2): it is no image of a known format")
    assert " ".join(lines[5].split()) == "6 images with a side below 512 pixels enlarges them"
    assert [line.strip() for line in lines[6:10]][-1] == "…" and lines[10] == ""
    assert "a lower bound" in lines[11] and len(lines) == 14
    unused = f"not used: 1 unreadable, for example {folder}/chelsea.jpg"
    assert lines[12] == f"{folder}: 7 images; captions: 7 of metadata; {unused}"
    assert lines[13].startswith(f"{folder}: image folder, 7 samples, 7 captions; images: smallest 384 x 384, median")


def test_each_kind_says_what_training_does():
    assert all(kind.title and kind.training for kind in KINDS.values())


def test_mistakes_are_one_line(tmp_path, capsys, tokenizer_folder):
    (tmp_path / "empty").mkdir()
    cases = {
        (tmp_path / "nowhere",): "there is nothing at '.*nowhere'; expected a folder of images",
        (tmp_path / "p-{0..2}.tar",): "there are no shards at '.*p-0.tar'",
        (tmp_path / "empty",): "holds no data; expected images with captions, tar",
        ("pipe:cat x.tar",): "is a stream, which cannot be inspected",
        (PHOTOS, "--tokenizer", tmp_path): "--tokenizer: '.*' has no vocab.json",
        (PHOTOS, "--resolutoin=5"): "--resolutoin is not a flag of this script; did you mean --resolution",
        (PHOTOS, "--processes=0"): "--processes: '0' is not a whole number above 0",
        (PHOTOS, "more"): "^ppdiffusers-train check: error: unexpected argument 'more'",
    }
    for argv, message in cases.items():
        line = refused(capsys, "check", *argv)
        assert re.search(message, line), line


def test_a_config_file_serves_the_commands_too(tmp_path, capsys):
    (tmp_path / "check.yaml").write_text("resolution: 300\njson: true\nprocesses: 1\n")
    cli.main(["check", str(PHOTOS), "--config", str(tmp_path / "check.yaml")])
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.parametrize("module", ["ppdiffusers_train.tools.inspection", "ppdiffusers_train.cli"])
def test_processes_that_decode_images_load_no_heavy_library(module):
    """Both are imported by each of them: the second where the command itself was started."""
    code = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"paddle", "ppdiffusers", "paddlenlp", "datasets", "pandas", "pyarrow", "webdataset"} & set(loaded)
