"""The cache of encoded samples, through the decoder's script."""

import ppdiffusers_train  # noqa: F401

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from PIL import Image

from ppdiffusers_train.data import encoded_cache
from ppdiffusers_train.data.encoded_cache import EncodedSamples, Entry, encoders_digest, remove_leftovers
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.runtime.precision import Precision
from ppdiffusers_train.runtime.processes import this_machine
from ppdiffusers_train.tensor_files import Stored
from tests.conftest import DECODER_SCRIPT, copy_photos, same, scalars, weights


@pytest.fixture
def cached(train_decoder, tmp_path):
    """Run the decoder's script with a cache in `tmp_path/cache`; returns (output folder, files in the cache)."""

    def train(*flags, out="cached"):
        output_dir = train_decoder(f"--encoded_cache_dir={tmp_path / 'cache'}", *flags, out=out)
        return output_dir, files(tmp_path / "cache")

    return train


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_cached_run_ends_in_the_same_bits_as_one_that_encodes_online(train_decoder, cached):
    online = train_decoder("--max_train_steps=4", "--train_batch_size=3")
    output_dir, entries = cached("--max_train_steps=4", "--train_batch_size=3")
    assert scalars(online) == scalars(output_dir) and same(weights(online), weights(output_dir))
    assert len(entries) == 7


@pytest.mark.once
def test_a_second_run_encodes_nothing(cached, capsys):
    entries = cached()[1]
    capsys.readouterr()
    assert cached("--seed=5", out="again")[1] == entries
    assert "0 of 7 samples are still to be encoded" in capsys.readouterr().out


@pytest.mark.once
def test_a_new_image_costs_one_encoding_and_a_changed_one_too(cached, tmp_path):
    data = copy_photos(tmp_path / "three", 3)
    before = cached(f"--train_data_dir={data}")[1]
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    Image.new("RGB", (70, 90), "red").save(data / "new.png")
    (data / "metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"file_name": "new.png", "text": "red"}])
    )
    after = cached(f"--train_data_dir={data}", out="more")[1]
    assert len(after) == 4 and before.items() <= after.items()
    Image.new("RGB", (70, 90), "blue").save(data / "new.png")
    changed = cached(f"--train_data_dir={data}", out="changed")[1]
    assert len(changed) == 5 and after.items() <= changed.items()


@pytest.mark.once
def test_another_resolution_or_encoder_never_meets_an_old_entry(cached, kandinsky, tmp_path):
    before = cached()[1]
    resized = cached("--resolution=32", out="small")[1]
    assert len(resized) == 14 and before.items() <= resized.items()
    other = shutil.copytree(kandinsky[1], tmp_path / "decoder")
    edit_weights(other / "movq" / "diffusion_paddle_model.safetensors")
    assert len(cached(f"--pretrained_decoder_model_name_or_path={other}", out="other")[1]) == 21


def edit_weights(file):
    """Change the last bit of one weight."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(file)
    name = next(iter(arrays))
    arrays[name].flat[0] = np.nextafter(arrays[name].flat[0], np.float32(9))
    file.unlink()
    save_file(arrays, file, metadata={"format": "pd"})


@pytest.mark.once
def test_an_interrupted_cache_goes_on(cached, tmp_path):
    entries = cached()[1]
    lost = sorted(entries)[:3]
    for file in lost:
        file.unlink()
    ended = subprocess.Popen(["true"])
    ended.wait()
    half = lost[0].parent / f".{lost[0].stem}.{this_machine():x}.{ended.pid}"
    half.write_bytes(b"half a file")
    kept = {file: time for file, time in entries.items() if file not in lost}
    again = cached(out="again")[1]
    assert kept.items() <= again.items() and set(entries) == set(again), "and the half file is gone"
    assert same(weights(tmp_path / "cached"), weights(tmp_path / "again"))


@pytest.mark.once
def test_a_damaged_entry_is_named(cached, capsys):
    for file in cached()[1]:
        file.write_bytes(b"?")
    with pytest.raises(SystemExit) as stopped:
        cached(out="again")
    assert stopped.value.code == 2 and "delete it, and it will be encoded again" in capsys.readouterr().err


@pytest.mark.once
def test_two_processes_fill_one_cache_together(decoder_flags, tmp_path, train_decoder):
    online = train_decoder()

    def run(name):
        flags = [*decoder_flags, f"--encoded_cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / name}"]
        return subprocess.run([sys.executable, DECODER_SCRIPT, *flags], capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(run, "ab"))
    assert [process.returncode for process in done] == [0, 0], "\n".join(process.stderr[-2000:] for process in done)
    assert len(files(tmp_path / "cache")) == 7
    assert same(weights(tmp_path / "a"), weights(online)) and same(weights(tmp_path / "b"), weights(online))


@pytest.mark.once
def test_what_other_processes_have_written_is_not_missing(tmp_path):
    class Pictures:
        name, captions, image_digest = str, staticmethod(lambda row: ["a", "b"]), staticmethod(lambda row: bytes([row]))

        def __len__(self):
            return 100

    samples = EncodedSamples(tmp_path, Pictures(), None, 1)
    samples.entries(70)[0].write({"x": np.zeros(1)})
    assert samples.missing(Ranks(0, 1)) == {row: [1] if row == 70 else [0, 1] for row in range(100)}


@pytest.mark.once
def test_unfinished_files_go_when_their_writers_have_ended(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    entry, here = Entry(tmp_path, b"image", 0, "caption", 0), f"{this_machine():x}"
    names = {
        f".{entry.file.stem}.{here}.{ended.pid}": False,
        f"..{entry.file.stem}.{here}.{ended.pid}.tmp": False,
        f".{entry.file.stem}.{here}.{os.getpid()}": True,
        f".{entry.file.stem}.{here}0.{ended.pid}": True,  # of another machine
        f".{entry.file.stem}.{here}1.{ended.pid}": False,  # likewise, two days ago
    }
    entry.write({"x": np.zeros(1)})
    for name in names:
        entry.file.with_name(name).write_bytes(b"half")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(entry.file.with_name(list(names)[-1]), (long_ago, long_ago))
    remove_leftovers(tmp_path)
    kept = {file.name for file in entry.file.parent.iterdir()}
    assert kept == {entry.file.name, *(name for name, is_kept in names.items() if is_kept)}


@pytest.mark.once
def test_a_process_that_is_killed_while_it_writes_leaves_what_the_next_fill_removes(tmp_path):
    """The names that `Entry.write` gives, whatever they are."""

    class HalfWritten(Stored):
        def numpy(self):
            os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if not process:
        try:
            half = HalfWritten(None, np.dtype("float32"), [4], 0)
            Entry(tmp_path, b"image", 0, "caption", 0).write({"x": half})
        finally:
            os._exit(1)
    os.waitpid(process, 0)
    assert len(files(tmp_path)) == 1
    remove_leftovers(tmp_path)
    assert not files(tmp_path)


def test_validation_loads_the_freed_encoders_and_draws_the_same(train_decoder, cached):
    flags = ["--validation_prompt=a cat", "--validation_steps=1", "--validation_inference_steps=2"]
    online, (output_dir, _) = train_decoder(*flags), cached(*flags)
    pictures = [(folder / "validation" / "step-2.png").read_bytes() for folder in (online, output_dir)]
    assert pictures[0] == pictures[1] and same(weights(online), weights(output_dir))


@pytest.mark.once
def test_variants_of_a_job_that_crops_nothing_are_announced_and_not_kept(cached, capsys):
    assert len(cached("--cache_variants=3")[1]) == 7
    assert "--cache_variants 3: no effect" in capsys.readouterr().out


class Cropping(DiffusionTrainingModule):
    """A module that draws in `preprocess`, and reads the caption."""

    encoders = ("encoder",)

    def __init__(self, factor=2.0):
        super().__init__()
        self.encoder = paddle.nn.Linear(1, 1)
        self.encoder.weight.set_value(paddle.full([1, 1], factor))

    def preprocess(self, row, draws):
        return {"crop": np.float32([draws.uniform("crop_left")]), "length": np.int64(len(row["caption"]))}

    def encode(self, batch):
        return {"crop": self.encoder(batch["crop"]), "length": batch["length"]}


@pytest.mark.once
def test_variants_differ_and_belong_to_the_content(tmp_path):
    draws = [Entry(tmp_path, b"image", 0, "caption", variant).draws().uniform("crop_left") for variant in range(4)]
    assert len(set(draws)) == 4
    assert draws[2] == Entry(tmp_path, b"image", 9, "caption", 2).draws().uniform("crop_left"), "any row"
    assert draws[2] != Entry(tmp_path, b"another", 0, "caption", 2).draws().uniform("crop_left")


def edited_preprocess(self, row, draws):
    return {"crop": np.float32([draws.uniform("crop_left")]), "length": np.int64(len(row["caption"].strip()))}


def edited_encode(self, batch):
    return {"crop": self.encoder(batch["crop"]) * 2, "length": batch["length"]}


def with_method(name, method):
    return lambda: type("Edited", (Cropping,), {name: method})()


@pytest.mark.parametrize(
    "changed",
    [
        with_method("preprocess", edited_preprocess),
        with_method("encode", edited_encode),
        with_method("encoding_settings", lambda self: {"resolution": 64}),
        lambda: Cropping(3.0),
    ],
    ids=["preprocess", "encode", "settings", "weights"],
)
def test_the_digest_of_the_encoders_follows(changed):
    digest = encoders_digest(changed(), Precision("no"))
    assert digest != encoders_digest(Cropping(), Precision("no"))
    assert digest == encoders_digest(changed(), Precision("no"))


def test_the_digest_follows_how_pixels_come_of_an_image(monkeypatch):
    def digest(*background):
        return encoders_digest(Cropping(), Precision("no"), *background)

    white, red = digest(), digest("#ff0000")
    monkeypatch.setattr(encoded_cache, "VERSION", encoded_cache.VERSION + 1)
    assert len({white, red, digest()}) == 3


def test_the_digest_does_not_follow_what_encodes_nothing():
    edited = with_method("forward", lambda self, encoded, draws: encoded["crop"].sum())()
    assert encoders_digest(edited, Precision("no")) == encoders_digest(Cropping(), Precision("no"))
