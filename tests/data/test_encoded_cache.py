"""The cache of encoded samples, through the decoder's script."""

import ppdiffusers_train  # noqa: F401

import gc
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image

from ppdiffusers_train.data import encoders_key, pixels
from ppdiffusers_train.data.encoded_cache import EncodedSamples, Entry, RunEntries
from ppdiffusers_train.data.encoders_key import encoders_digest, file_digest, shared_digests
from ppdiffusers_train.data.loader import iterate_batches
from ppdiffusers_train.data.order import SampleOrder
from ppdiffusers_train.data.pack_writer import PackWriter
from ppdiffusers_train.data.packs import Packs
from ppdiffusers_train.loop.bad_samples import BadSamples
from ppdiffusers_train.loop.filling import encode_dataset
from ppdiffusers_train.loop.memory_estimate import allocated
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.run import Run
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.module import DiffusionTrainingModule, encode_batch
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.runtime.precision import Precision
from ppdiffusers_train.runtime.processes import this_machine
from tests.conftest import DECODER_SCRIPT, copy_photos, encoded_samples, same, scalars, weights


@pytest.fixture
def cached(train_decoder, tmp_path):
    """Run the decoder's script with a cache in `tmp_path/cache`; returns (output folder, samples in the cache)."""

    def train(*flags, out="cached"):
        output_dir = train_decoder(f"--encoded_cache_dir={tmp_path / 'cache'}", *flags, out=out)
        return output_dir, encoded_samples(tmp_path / "cache")

    return train


def packs_in(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.pack")}


def test_a_cached_run_ends_in_the_same_bits_as_one_that_encodes_online(train_decoder, cached):
    online = train_decoder("--max_train_steps=4", "--train_batch_size=3")
    output_dir, entries = cached("--max_train_steps=4", "--train_batch_size=3")
    assert scalars(online) == scalars(output_dir) and same(weights(online), weights(output_dir))
    assert len(entries) == 7


def test_what_is_trained_takes_no_memory_while_samples_are_encoded(kandinsky_jobs, train, tmp_path, monkeypatch):
    module, taken = kandinsky_jobs["decoder"].KandinskyDecoderTrainingModule, {}

    def noting(name, method):
        def call(self, *args):
            models = {part: model for part, model in self.named_children() if model is not None}
            sizes = {part: sum(4 * weights.size for weights in model.parameters()) for part, model in models.items()}
            taken.setdefault(name, (allocated() - before, sizes))
            return method(self, *args)

        monkeypatch.setattr(module, name, call)

    for name in ("encode", "forward"):
        noting(name, getattr(module, name))
    gc.collect()
    before = allocated()
    train("decoder", f"--encoded_cache_dir={tmp_path / 'cache'}", "--use_ema")
    (encoding, sizes), (training, left) = taken["encode"], taken["forward"]
    assert set(sizes) == {"unet", "movq", "image_encoder"} and set(left) == {"unet"}
    encoders = sizes["movq"] + sizes["image_encoder"]
    assert encoders < encoding < encoders + 0.2 * sizes["unet"], "neither the UNet nor its average"
    assert 2 * sizes["unet"] < training < 2 * sizes["unet"] + 0.5 * encoders, "and no encoder"


@pytest.mark.once
def test_a_second_run_encodes_nothing_and_loads_no_encoder(cached, capsys, tmp_path, monkeypatch):
    cached()
    packs, load, loaded = packs_in(tmp_path / "cache"), PipelineFolder.load, []
    monkeypatch.setattr(PipelineFolder, "load", lambda self, part, of: loaded.append(part) or load(self, part, of))
    capsys.readouterr()
    cached("--seed=5", out="again")
    assert sorted(loaded) == ["image_processor", "scheduler", "unet"]
    assert "0 of 7 samples are still to be encoded" in capsys.readouterr().out
    assert len(packs) == 1 and packs_in(tmp_path / "cache") == packs


@pytest.mark.once
def test_a_new_image_costs_one_encoding_and_a_changed_one_too(cached, tmp_path, capsys):
    data = copy_photos(tmp_path / "three", 3)
    before = cached(f"--train_data_dir={data}")[1]
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    Image.new("RGB", (70, 90), "red").save(data / "new.png")
    (data / "metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"file_name": "new.png", "text": "red"}])
    )
    capsys.readouterr()
    after = cached(f"--train_data_dir={data}", out="more")[1]
    assert len(after) == 4 and set(before) < set(after)
    Image.new("RGB", (70, 90), "blue").save(data / "new.png")
    changed = cached(f"--train_data_dir={data}", out="changed")[1]
    assert len(changed) == 5 and set(after) < set(changed)
    assert capsys.readouterr().out.count(": 1 of 4 samples are still to be encoded") == 2


@pytest.mark.once
def test_another_resolution_or_encoder_never_meets_an_old_entry(cached, kandinsky, tmp_path):
    before = cached()[1]
    resized = cached("--resolution=32", out="small")[1]
    assert len(resized) == 14 and set(before) < set(resized)
    other = shutil.copytree(kandinsky[1], tmp_path / "decoder")
    edit_weights(other / "movq" / "diffusion_paddle_model.safetensors")
    file = other / "movq" / "diffusion_paddle_model.safetensors"
    assert len(cached(f"--pretrained_decoder_model_name_or_path={other}", out="other")[1]) == 21
    stat = file.stat()
    edit_weights(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size, "another file of the same size and time"
    assert len(cached(f"--pretrained_decoder_model_name_or_path={other}", out="replaced")[1]) == 28


def edit_weights(file):
    """Change the last bit of one weight."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(file)
    name = next(iter(arrays))
    arrays[name].flat[0] = np.nextafter(arrays[name].flat[0], np.float32(9))
    file.unlink()
    save_file(arrays, file, metadata={"format": "pd"})


@pytest.mark.once
def test_an_interrupted_cache_goes_on(cached, tmp_path, capsys):
    """A pack is lost, and another one was not complete when its writer was killed."""
    data = copy_photos(tmp_path / "data", 4)
    cached(f"--train_data_dir={data}", out="four")
    (kept,) = packs_in(tmp_path / "cache")
    cached()
    (lost,) = set(packs_in(tmp_path / "cache")) - {kept}
    lost.unlink()
    ended = subprocess.Popen(["true"])
    ended.wait()
    half = lost.with_name(f".{lost.stem}.{this_machine():x}.{ended.pid}")
    half.write_bytes(b"half a pack")
    capsys.readouterr()
    assert len(cached(out="again")[1]) == 7 and not half.exists() and kept.exists()
    assert "3 of 7 samples are still to be encoded" in capsys.readouterr().out
    assert same(weights(tmp_path / "cached"), weights(tmp_path / "again"))


def cut(pack):
    pack.write_bytes(pack.read_bytes()[:-100])


def overwrite(pack):
    pack.write_bytes(b"?")


def damage_index(pack):
    content = bytearray(pack.read_bytes())
    content[content.index(b'"of"')] ^= 1
    pack.write_bytes(content)


@pytest.mark.once
@pytest.mark.parametrize("harm", [cut, overwrite, damage_index])
def test_a_pack_that_is_not_whole_is_named_and_encoded_again(cached, capsys, tmp_path, harm):
    cached()
    (pack,) = packs_in(tmp_path / "cache")
    harm(pack)
    cached(out="again")
    said = capsys.readouterr().out
    assert f"{pack}: is not used, " in said and said.count("7 of 7 samples are still to be encoded") == 2
    assert same(weights(tmp_path / "cached"), weights(tmp_path / "again"))


@pytest.mark.once
def test_a_pack_of_other_encoders_is_named_and_not_read(cached, capsys, tmp_path):
    cached()
    (foreign,) = packs_in(tmp_path / "cache")
    cached("--resolution=32", out="small")
    (own,) = set(packs_in(tmp_path / "cache")) - {foreign}
    shutil.copy(foreign, own.parent / foreign.name)
    own.unlink()
    cached("--resolution=32", out="again")
    said = capsys.readouterr().out
    assert f"{foreign.name}: is not used, it belongs to '{foreign.parent.name}'" in said
    assert same(weights(tmp_path / "small"), weights(tmp_path / "again"))


@pytest.mark.once
def test_samples_of_an_older_version_are_left_alone(cached, tmp_path, capsys):
    old = tmp_path / "cache" / "0123" / "ab" / "ab00.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    cached()
    assert "holds samples of other models, settings, code or versions, which are kept but not used" in (
        capsys.readouterr().out
    )
    assert old.read_bytes() == b"old"


@pytest.mark.once
def test_two_processes_fill_one_cache_together(decoder_flags, tmp_path, train_decoder):
    online = train_decoder()

    def run(name):
        flags = [*decoder_flags, f"--encoded_cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / name}"]
        return subprocess.run([sys.executable, DECODER_SCRIPT, *flags], capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(run, "ab"))
    assert [process.returncode for process in done] == [0, 0], "\n".join(process.stderr[-2000:] for process in done)
    assert len(encoded_samples(tmp_path / "cache")) == 7
    assert same(weights(tmp_path / "a"), weights(online)) and same(weights(tmp_path / "b"), weights(online))


@pytest.mark.once
def test_what_other_processes_have_written_is_not_missing(tmp_path):
    class Pictures:
        name, captions, image_digest = str, staticmethod(lambda row: ["a", "b"]), staticmethod(lambda row: bytes([row]))

        def __len__(self):
            return 100

    samples = EncodedSamples(Packs(tmp_path), RunEntries(Pictures(), None, 1))
    with PackWriter(tmp_path) as other:
        other.add(samples.entries.of_row(70)[0].key, {"x": np.zeros(1)})
    everything = [[row, number] for row in range(100) for number in (0, 1)]
    assert samples.missing(Ranks(0, 1)).tolist() == everything
    samples.packs.refresh()
    assert samples.missing(Ranks(0, 1)).tolist() == [pair for pair in everything if pair != [70, 0]]


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
def test_variants_differ_and_belong_to_the_content():
    draws = [Entry(b"image", 0, "caption", variant).draws().uniform("crop_left") for variant in range(4)]
    assert len(set(draws)) == 4
    assert draws[2] == Entry(b"image", 9, "caption", 2).draws().uniform("crop_left"), "any row"
    assert draws[2] != Entry(b"another", 0, "caption", 2).draws().uniform("crop_left")


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
    digest = encoders_digest(changed(), Precision("no"), {})
    assert digest != encoders_digest(Cropping(), Precision("no"), {})
    assert digest == encoders_digest(changed(), Precision("no"), {})


def test_the_digest_of_a_shared_method_follows_it_and_what_it_calls_with_no_more():
    class Sharing(Cropping):
        shared, encoders = ("embed",), ("encoder", "another")

        def embed(self, value):
            return self.encoder(value)

    def digests(method=Sharing.embed, precision=None, **own):
        module = type("Sharing", (Sharing,), {"embed": method, **own})(own.get("factor", 1.0))
        return shared_digests(module, precision or Precision("no"), {"another": own.get("another_digest", "")})

    first = digests()
    assert first == digests(preprocess=edited_preprocess, encoding_settings=lambda self: {"resolution": 64})
    assert first == digests(another_digest="other weights")
    assert first != digests(lambda self, value: self.encoder(value) * 2)
    assert first != digests(factor=2.0)
    low = SimpleNamespace(enabled=True, mixed_precision="bf16", level="O1")
    assert len({*map(str, (first, digests(precision=low), digests(precision=low, keep_float32=("encoder",))))}) == 3
    assert digests(precision=low) == digests(precision=low, keep_float32=("another",))


def test_the_digest_follows_how_pixels_come_of_an_image(monkeypatch):
    def digest(*background):
        return encoders_digest(Cropping(), Precision("no"), {}, *background)

    white, red = digest(), digest("#ff0000")
    monkeypatch.setattr(pixels, "VERSION", pixels.VERSION + 1)
    assert len({white, red, digest()}) == 3


def test_the_digest_does_not_follow_what_encodes_nothing():
    edited = with_method("forward", lambda self, encoded, draws: encoded["crop"].sum())()
    assert encoders_digest(edited, Precision("no"), {}) == encoders_digest(Cropping(), Precision("no"), {})


@pytest.mark.once
def test_a_file_of_weights_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    file, read, digest_of = tmp_path / "model.safetensors", [], encoders_key.content_digest_of
    monkeypatch.setattr(encoders_key, "content_digest_of", lambda opened: read.append(opened.name) or digest_of(opened))
    monkeypatch.setattr(encoders_key, "TICK_SECONDS", 0)

    def digest():
        return file_digest([file], tmp_path / "index")

    file.write_bytes(b"weights")
    first = digest()
    assert digest() == first and len(read) == 1
    stat = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest() != first and len(read) == 2, "of the same size and time"
    (tmp_path / "index" / "weights.json").write_text('{"half')
    assert digest() != first and len(read) == 3
    monkeypatch.setattr(encoders_key, "TICK_SECONDS", 3600)
    file.write_bytes(b"written a moment ago")
    assert digest() == digest() and len(read) == 5, "it may change once more within the same time"


class Halves(Cropping):
    """A module whose encoders compute in several types, as under autocast."""

    def encode(self, batch):
        found = {kind: (batch["crop"] * 0.3).astype(kind) for kind in ("float16", "bfloat16", "float32", "float64")}
        return {**found, "length": batch["length"]}


class Captions:
    captions, image_digest = staticmethod(lambda row: [f"number {row}"]), staticmethod(lambda row: bytes([row]))
    name = str

    def __len__(self):
        return 5

    def count_captions(self):
        return 5

    def __getitem__(self, row):
        return {"image": row, "caption": f"number {row}"}


@pytest.mark.once
def test_numbers_are_kept_in_the_type_in_which_they_were_computed(tmp_path):
    module, state = Halves(), SimpleNamespace(precision=Precision("no"), bad_samples=BadSamples(0))
    args = SimpleNamespace(
        encoded_cache_dir=str(tmp_path / "cache"), cache_variants=1, dataloader_num_workers=1, index_dir=str(tmp_path)
    )
    plan = Plan(Run(args, Ranks(0, 1), None, {}, "run", []), module, Captions(), SampleOrder(0, 5), 1, 1, {})
    samples, _ = encode_dataset(plan, state)
    batches = iterate_batches(samples, [[0, 1], [2, 3, 4]], 1)
    for positions, (batch, _) in zip(([0, 1], [2, 3, 4]), batches):
        rows = [samples.entries.at(position) for position in positions]
        inputs = [row.preprocessed(Captions(), module.preprocess) for row in rows]
        online = encode_batch(
            module, {name: paddle.to_tensor(np.stack([row[name] for row in inputs])) for name in inputs[0]}
        )
        encoded = samples.encode(batch)
        assert list(encoded) == sorted(online)
        for name, tensor in online.items():
            assert encoded[name].dtype == tensor.dtype and encoded[name].shape == tensor.shape, name
            assert np.array_equal(encoded[name].numpy(), tensor.numpy()), name
    stored = next(iter(encoded_samples(tmp_path / "cache").values()))
    assert {name: array.itemsize for name, array in stored.items()} == {
        "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "length": 8,
    }  # fmt: skip
