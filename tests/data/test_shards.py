"""Tar archives and local shards: what is read, and what is said of broken ones."""

import ppdiffusers_train  # noqa: F401

import json
import os
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppdiffusers_train.arguments import ArgumentParser, add_data_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.tar_samples import read_samples
from ppdiffusers_train.errors import UserError
from tests.data.make_shards import shards_of, write_tar

pytestmark = pytest.mark.once  # no Paddle in it


def dataset_of(*flags):
    parser = ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(list(map(str, flags)))
    args.seed = 0
    return build_dataset(args)


@pytest.fixture
def shards(tmp_path):
    """`shards(*flags)` are the rows of `--train_shards_path_or_url`, indices kept below `tmp_path`."""
    return lambda path, *flags: dataset_of(f"--train_shards_path_or_url={path}", f"--cache_dir={tmp_path}", *flags)


def captions(rows):
    return [rows[index]["caption"] for index in range(len(rows))]


names = st.text(string.ascii_letters + string.digits + "_-é図", min_size=1, max_size=80).filter(
    lambda name: not name.startswith("__")
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        names,
        st.tuples(st.sampled_from(["jpg", "png", "JPEG", "webp"]), st.binary(max_size=2000), st.text(max_size=50)),
        min_size=1,
    ),
    st.sampled_from(["txt", "text", "caption", "json"]),
    st.booleans(),
)
def test_every_sample_is_read_from_a_file_and_from_a_stream(samples, kind, text_first):
    files = []
    for key, (extension, image, caption) in samples.items():
        text = json.dumps({"text": caption}).encode() if kind == "json" else caption.encode()
        both = [(f"a/{key}.{extension}", image), (f"a/{key}.{kind}", text), (f"a/{key}.cls", b"7")]
        files += both[::-1] if text_first else both
    with tempfile.TemporaryDirectory() as folder:
        tar = write_tar(Path(folder) / "x.tar", files)
        with tar.open("rb") as file, tar.open("rb") as stream:
            found = list(read_samples(file, "text", sequential=False))
            streamed = list(read_samples(stream, "text", sequential=True))
        content = tar.read_bytes()
    assert [sample.problem for sample in found + streamed] == [""] * 2 * len(samples)
    expected = [caption if kind == "json" else caption.strip() for _, _, caption in samples.values()]
    assert [sample.captions[0] for sample in found] == [sample.captions[0] for sample in streamed] == expected
    images = [image for _, image, _ in samples.values()]
    assert [sample.image for sample in streamed] == images
    assert [content[sample.offset : sample.offset + sample.size] for sample in found] == images


def test_shards_are_a_folder_a_file_a_brace_pattern_or_a_glob(tmp_path, shards):
    shards_of(tmp_path / "s", [2, 3, 1])
    everything = ["0 0", "0 1", "1 0", "1 1", "1 2", "2 0"]
    assert captions(shards(tmp_path / "s")) == everything
    assert captions(shards(f"{tmp_path}/s/{{000..002}}.tar")) == everything
    assert captions(shards(f"{tmp_path}/s/*.tar")) == everything
    assert captions(shards(tmp_path / "s" / "001.tar")) == ["1 0", "1 1", "1 2"]


def test_the_images_are_those_of_the_archive(tmp_path, shards):
    shards_of(tmp_path / "s", [3])
    rows = shards(tmp_path / "s")
    assert [rows[index]["image"].getpixel((0, 0)) for index in range(3)] == [(0, 29 * index, 90) for index in range(3)]
    assert rows.image_size(1) == (40, 30) and rows.name(1) == f"{tmp_path}/s/000.tar: 0001.png"
    assert len({rows.image_digest(index) for index in range(3)}) == 3


def test_max_train_samples_takes_some_by_the_seed(tmp_path, shards):
    shards_of(tmp_path / "s", [4, 4])
    some = captions(shards(tmp_path / "s", "--max_train_samples=3"))
    assert len(set(some)) == 3 and some != captions(shards(tmp_path / "s"))[:3]
    assert len(shards(tmp_path / "s", "--max_train_samples=100")) == 8


def test_an_index_is_made_once_and_anew_when_the_shard_has_changed(tmp_path, shards):
    shards_of(tmp_path / "s", [2])
    shards(tmp_path / "s")
    (index,) = (tmp_path / "ppdiffusers_train" / "shards").iterdir()
    made = index.stat().st_mtime_ns
    shards(tmp_path / "s")
    assert index.stat().st_mtime_ns == made
    shards(tmp_path / "s", "--caption_column=other")
    assert index.stat().st_mtime_ns > made
    shards_of(tmp_path / "s", [3])
    assert len(shards(tmp_path / "s")) == 3
    index.write_bytes(b"nonsense")
    assert len(shards(tmp_path / "s")) == 3


def test_data_of_other_captions_has_another_digest(tmp_path, shards):
    shards_of(tmp_path / "s", [2, 3])
    whole = shards(tmp_path / "s").digest()
    assert shards(tmp_path / "s" / "001.tar").digest() != whole == shards(tmp_path / "s").digest()


def test_more_shards_than_a_process_may_open_files_are_read(tmp_path, shards):
    import resource

    shards_of(tmp_path / "s", [1] * 80)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        assert len(captions(shards(tmp_path / "s"))) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    "path, flags, message",
    [
        ("nowhere", [], "--train_shards_path_or_url: there are no shards at 'nowhere'; expected a file, a folder"),
        ("nowhere-{0..2}.tar", [], "there are no shards at 'nowhere-0.tar'"),
        (".", [], "there are no shards at '.'; expected a folder with *.tar in it"),
        ("pipe:true", [], "--max_train_samples: missing; expected how many samples of the stream make an epoch"),
        ("pipe:true", ["--encoded_cache_dir=x"], "--encoded_cache_dir: needs shards in a local folder"),
        ("{pipe:true,x.tar}", [], "is streamed in part"),
        ("x.tar", ["--train_data_dir=x"], "--train_data_dir or --dataset_name as well; expected one of them"),
    ],
)
def test_a_mistake_is_named(tmp_path, monkeypatch, shards, path, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        shards(path, *flags)
    assert message in str(error.value)


def test_a_command_is_never_taken_from_a_file_of_flags(tmp_path, capsys):
    config = tmp_path / "flags.yaml"
    config.write_text("train_shards_path_or_url: 'pipe:touch harm'")
    with pytest.raises(SystemExit) as stopped:
        dataset_of(f"--config={config}", "--max_train_samples=5")
    assert stopped.value.code == 2 and "pipe: is taken from the command line only" in capsys.readouterr().err
