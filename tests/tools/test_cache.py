"""`ppdiffusers-train cache`: what it lists, what it removes, and what it refuses."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import json
import shutil

import pytest

from tests.conftest import copy_photos, encoded_samples

pytestmark = pytest.mark.once


def refused(capsys, run):
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def cache(train_decoder, tmp_path):
    """A cache with 3 + 2 samples of two data sets, and 3 of another resolution: (its folder, the two data sets)."""
    data = [copy_photos(tmp_path / "three", 3), copy_photos(tmp_path / "five", 5)]
    for out, flags in {
        "a": [f"--train_data_dir={data[0]}"],
        "b": [f"--train_data_dir={data[1]}"],
        "c": [f"--train_data_dir={data[0]}", "--resolution=32"],
    }.items():
        train_decoder(f"--encoded_cache_dir={tmp_path / 'cache'}", "--max_train_steps=1", *flags, out=out)
    return tmp_path / "cache", data


@pytest.fixture
def inspect(capsys, tmp_path):
    """`inspect(folder, *flags)`: the JSON document of the command."""

    def run(folder, *flags):
        capsys.readouterr()
        cli.main(["cache", str(folder), f"--index_dir={tmp_path / 'index'}", "--json", *map(str, flags)])
        return json.loads(capsys.readouterr().out)

    return run


def test_it_lists_what_a_cache_holds_and_removes_what_no_data_needs(cache, inspect, capsys):
    folder, (three, five) = cache
    before = encoded_samples(folder)
    found = sorted(inspect(folder)["encoders"], key=lambda encoded: encoded["samples"])
    assert [encoded["samples"] for encoded in found] == [3, 5] and [encoded["packs"] for encoded in found] == [1, 2]
    assert [encoded["about"]["settings"]["resolution"] for encoded in found] == [32, 64]
    assert all(encoded["about"]["job"] == "KandinskyDecoderTrainingModule" for encoded in found)
    files = [file for file in folder.rglob("*.pack")]
    assert sum(encoded["bytes"] for encoded in found) == sum(file.stat().st_size for file in files)

    def not_needed(*flags):
        return sorted(encoded["not_needed"] for encoded in inspect(folder, *flags)["encoders"])

    assert not_needed("--train_data_dir", three, five) == not_needed("--train_data_dir", five) == [0, 0]
    assert not_needed("--train_data_dir", three) == [0, 2]
    assert encoded_samples(folder).keys() == before.keys(), "nothing is removed without --prune"
    cli.main(["cache", str(folder), "--train_data_dir", str(three), "--prune"])
    said = capsys.readouterr().out
    assert "8 samples of 2 sets of encoders" in said and "2 samples are not needed by the data" in said
    after = encoded_samples(folder)
    assert len(after) == 6 and after.keys() < before.keys()
    assert all((after[key][name] == before[key][name]).all() for key in after for name in after[key])


def test_samples_of_older_versions_and_damaged_packs_are_named_and_removed(cache, inspect, capsys):
    folder, (_, five) = cache
    old, other = folder / ("0" * 32) / "ab" / "ab00.safetensors", folder / "mine" / "ab" / "ab00.safetensors"
    for file in (old, other):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"old")
    damaged = next(folder.glob("*/*.pack")).with_name("damaged.pack")
    damaged.write_bytes(b"?")
    cli.main(["cache", str(folder)])
    said = capsys.readouterr().out
    assert (
        "1 samples of an older version, which are not used" in said and "damaged.pack: damaged, or of another" in said
    )
    inspect(folder, "--prune", "--train_data_dir", five)
    assert not old.parents[1].exists() and not damaged.exists() and other.exists()
    assert len(encoded_samples(folder)) == 8


def test_a_data_set_of_several_captions_and_variants_needs_all_of_them(train_sdxl, photos, tmp_path, inspect):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "text": [row["text"]]} for row in rows]
    rows[0]["text"] = ["one", "two"]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = train_sdxl("sdxl", f"--train_data_dir={data}", "--cache_variants=3", "--max_train_steps=1")
    (found,) = inspect(out / "encoded", "--train_data_dir", data)["encoders"]
    assert found["samples"] == 3 * (len(rows) + 1) and found["not_needed"] == 0


def test_mistakes_get_one_line(cache, tmp_path, capsys):
    folder, (three, _) = cache
    (tmp_path / "empty").mkdir()
    mistakes = {
        (str(folder), "--prune"): "--prune: needs --train_data_dir",
        (str(tmp_path / "none"),): "cannot be read",
        (str(tmp_path / "empty"),): "holds no encoded samples",
        (str(folder), "--prune", "--train_data_dir", str(three), str(tmp_path / "empty")): "holds no data",
    }
    for words, message in mistakes.items():
        assert message in refused(capsys, lambda words=words: cli.main(["cache", *words]))
    (three / "metadata.jsonl").unlink()
    message = refused(capsys, lambda: cli.main(["cache", str(folder), "--prune", "--train_data_dir", str(three)]))
    assert "--train_data_dir: " in message
    assert len(encoded_samples(folder)) == 8
