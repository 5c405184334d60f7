"""`ppdiffusers-train preview`: what the sheet shows is what the training script's own code makes of the data."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import json

import numpy as np
import paddle
import pytest
from PIL import Image

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.encoded_cache import EncodedSamples, RunEntries
from ppdiffusers_train.data.encoders_key import encoders_digest, unloaded_encoders
from ppdiffusers_train.data.loader import PreprocessedSamples
from ppdiffusers_train.data.order import SampleOrder, order_samples
from ppdiffusers_train.data.packs import Packs
from ppdiffusers_train.models.text import count_tokens
from ppdiffusers_train.module import encode_batch
from ppdiffusers_train.runtime.precision import Precision
from ppdiffusers_train.tools.preview import PreviewedEntries
from tests.conftest import KANDINSKY, PHOTOS, ROOT, copy_photos
from tests.loop.test_dry_run import without_weights
from tests.tools.test_check import refused

pytestmark = pytest.mark.once

SDXL_SCRIPT = ROOT / "examples" / "sdxl" / "train_text_to_image_sdxl.py"
SD3_SCRIPT = ROOT / "examples" / "sd3" / "train_text_to_image_sd3.py"


@pytest.fixture
def preview(tmp_path, capsys):
    """`preview(script, *flags)` is (exit status, what `preview --json` printed, the sheet)."""

    def run(script, *flags):
        argv = ["preview", script, *flags, "--json", f"--preview_output={tmp_path / 'sheet.png'}"]
        try:
            cli.main(list(map(str, argv)))
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        document = json.loads(capsys.readouterr().out)
        assert document["file"] == str(tmp_path / "sheet.png") and document["status"] == status
        return status, document, Image.open(tmp_path / "sheet.png")

    return run


def tiles(document, sheet, name="pixel_values"):
    """The pictures of that name on a sheet, as arrays [H, W, 3] of integers, one per sample."""
    found, scale = [], document["scale"]
    for sample in document["samples"]:
        (place,) = [place for place in sample["pictures"] if place["name"] == name]
        left, top, width, height = (place[side] for side in ("left", "top", "width", "height"))
        enlarged = np.asarray(sheet.crop((left, top, left + scale * width, top + scale * height)))
        assert np.array_equal(enlarged, enlarged[::scale, ::scale].repeat(scale, 0).repeat(scale, 1))
        found.append(enlarged[::scale, ::scale])
    return found


def pixels(array, mean=0.5, std=0.5):
    """An array [3, H, W] that a model gets as the integers that it comes from."""
    return np.rint(255 * (array.transpose(1, 2, 0) * np.float64(std) + mean)).astype(np.uint8)


def test_tiles_and_captions_are_those_of_preprocess_at_the_run_s_own_positions(preview, sdxl_flags, build_sdxl_module):
    flags = ["--no_encoded_cache", "--random_flip", "--proportion_empty_prompts=0.4", "--seed=5"]
    status, document, sheet = preview(SDXL_SCRIPT, *sdxl_flags, *flags, "--preview_samples=10")
    module = build_sdxl_module("sdxl", *flags)
    dataset = build_dataset(module.args)
    samples = PreprocessedSamples(dataset, module.preprocess, SampleOrder(5, 7))
    assert status == 0 and document["seed"] == 5 and len(document["samples"]) == 10, "more than an epoch"
    dropped = 0
    for position, (tile, shown) in enumerate(zip(tiles(document, sheet), document["samples"])):
        arrays, row = samples[position], SampleOrder(5, 7).row(position)
        assert np.array_equal(tile, pixels(arrays["pixel_values"]))
        assert (shown["position"], shown["row"], shown["name"]) == (position, row, dataset.name(row))
        is_dropped = arrays["input_ids"][1] == module.tokenizer.eos_token_id
        caption = "" if is_dropped else dataset.captions(row)[0].replace("-", " - ")
        assert shown["captions"] == [caption, caption] and shown["error"] == ""
        height, width, top, left, rows, columns = arrays["time_ids"].astype(int)
        conditioning = f"original size {width} x {height}, crop left {left}, top {top}, target size {columns} x {rows}"
        assert shown["told"] == f"conditioning: {conditioning}"
        dropped += is_dropped
    assert 0 < dropped < 10


def test_with_the_encoded_cache_it_shows_what_the_cache_has_encoded(
    preview, sdxl_flags, build_sdxl_module, train_sdxl, capsys, tmp_path
):
    flags = ["--random_flip", "--proportion_empty_prompts=0.4", "--cache_variants=2"]
    out = train_sdxl("sdxl", *flags)
    capsys.readouterr()
    module = build_sdxl_module("sdxl", *flags)
    dataset, order = build_dataset(module.args), SampleOrder(0, 7)
    folder = out / "encoded" / encoders_digest(module, Precision("no"), unloaded_encoders(module, tmp_path))
    trained = EncodedSamples(Packs(folder), RunEntries(dataset, order, 2))
    status, document, sheet = preview(SDXL_SCRIPT, *sdxl_flags, *flags, "--preview_samples=9")
    samples = PreviewedEntries(dataset, module.preprocess, order, 2)
    for position, tile in enumerate(tiles(document, sheet)):
        arrays = samples[position]
        assert np.array_equal(tile, pixels(arrays["pixel_values"]))
        batch = {name: paddle.to_tensor(array[None]) for name, array in arrays.items()}
        for name, encoded in encode_batch(module, batch).items():
            assert np.array_equal(encoded.numpy()[0], trained[position][name]), "bit for bit"


def test_models_need_no_weights_and_each_tokenizer_reads_its_own_tokens(preview, sdxl, sdxl_flags, tmp_path):
    model = without_weights(sdxl, tmp_path / "model")
    vocabulary = json.loads((model / "tokenizer_2" / "vocab.json").read_text(encoding="utf-8"))
    size = len(vocabulary) - 2  # the last two are the beginning and the end
    turned = {token: (number + 7) % size if number < size else number for token, number in vocabulary.items()}
    (model / "tokenizer_2" / "vocab.json").write_text(json.dumps(turned))
    flags = [f"--pretrained_model_name_or_path={model}", "--preview_samples=2"]
    status, document, _ = preview(SDXL_SCRIPT, *sdxl_flags, *flags)
    assert status == 0 and all(len(shown["captions"]) == 2 for shown in document["samples"])
    for shown in document["samples"]:
        assert shown["captions"][0] == shown["captions"][1] and shown["captions"][0].startswith("a ")


def test_sd3_shows_what_each_of_its_tokenizers_reads(preview, sd3_flags, build_sd3_module):
    """CLIP puts a token before and after a caption, T5 only after it."""
    module = build_sd3_module("sd3")
    dataset, order = build_dataset(module.args), SampleOrder(0, 7)
    status, document, _ = preview(SD3_SCRIPT, *sd3_flags, "--preview_samples=3")
    assert status == 0
    for position, shown in enumerate(document["samples"]):
        caption = dataset.captions(order.row(position))[0]
        spaced = caption.replace("-", " - ")  # as CLIP's tokenizer decodes it
        assert shown["captions"] == [spaced, spaced, caption]
        assert shown["tokens"] == [count_tokens(getattr(module, name), caption) for name in module.folder.tokenizers]
        assert shown["tokens"][0] != shown["tokens"][2]
    dropped = ["--preview_samples=1", "--proportion_empty_prompts=0.999"]
    (shown,) = preview(SD3_SCRIPT, *sd3_flags, *dropped)[1]["samples"]
    assert (shown["captions"], shown["tokens"]) == (["", "", ""], [2, 2, 1])
    (shown,) = preview(SD3_SCRIPT, *sd3_flags, *dropped, "--no_t5")[1]["samples"]
    assert (shown["captions"], shown["tokens"]) == (["", ""], [2, 2])


def test_buckets_are_shown_in_the_run_s_order_at_their_own_sizes(preview, sdxl_flags, build_sdxl_module):
    flags = ["--aspect_ratio_buckets", "--resolution=192", "--train_batch_size=2", f"--train_data_dir={PHOTOS}"]
    status, document, sheet = preview(SDXL_SCRIPT, *sdxl_flags, *flags, "--preview_samples=15")
    module = build_sdxl_module("sdxl", *flags)
    order = order_samples(module, build_dataset(module.args), 0, 2, log=lambda message: None)
    assert [shown["row"] for shown in document["samples"]] == [order.row(position) for position in range(15)]
    sizes = [tile.shape[:2] for tile in tiles(document, sheet)]
    assert sizes == [module.buckets[order.bucket(position)] for position in range(15)] and len(set(sizes)) > 1
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3]


def test_the_decoder_s_two_pictures_and_the_prior_s_caption_are_shown(preview, decoder_flags, build):
    status, document, sheet = preview(KANDINSKY / "train_text_to_image_decoder_lora.py", *decoder_flags)
    assert status == 0 and all(sample["captions"] == [] for sample in document["samples"])
    module = build("decoder")
    dataset, order, processor = build_dataset(module.args), SampleOrder(0, 7), module.image_processor
    normalised = {"mean": processor.image_mean, "std": processor.image_std}
    samples = PreprocessedSamples(dataset, module.preprocess, order)
    for name, options in (("pixel_values", {}), ("clip_pixel_values", normalised)):
        for position, tile in enumerate(tiles(document, sheet, name)):
            assert np.array_equal(tile, pixels(samples[position][name], **options))
    status, document, sheet = preview(KANDINSKY / "train_text_to_image_prior.py", *decoder_flags)
    for position, shown in enumerate(document["samples"]):
        assert shown["captions"] == [dataset.captions(order.row(position))[0].replace("-", " - ")]
        assert [picture["name"] for picture in shown["pictures"]] == ["clip_pixel_values"]


def test_a_sample_that_cannot_be_used_is_grey_and_says_why(preview, sdxl_flags, tmp_path, capsys):
    folder = copy_photos(tmp_path / "broken", 3)
    (folder / "coffee.jpg").write_bytes((folder / "coffee.jpg").read_bytes()[:4000])
    flags = [f"--train_data_dir={folder}", "--preview_samples=3"]
    for more in ([], ["--no_encoded_cache"]):
        status, document, sheet = preview(SDXL_SCRIPT, *sdxl_flags, *flags, *more)
        errors = {shown["name"].split("/")[-1]: shown["error"] for shown in document["samples"]}
        assert status == 1 and errors["astronaut.jpg (row 0)"] == errors["chelsea.jpg (row 1)"] == ""
        assert errors["coffee.jpg (row 2)"].startswith(f"{folder}/coffee.jpg (row 2): the image cannot be read: ")
        assert [len(shown["pictures"]) for shown in document["samples"]].count(0) == 1
        assert 0.98 * 256**2 < np.all(np.asarray(sheet) == 128, axis=-1).sum() < 1.1 * 256**2


def test_put_before_a_training_command_it_prints_lines_and_writes_nothing_else(sdxl_flags, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    command = ["python", "-u", "-m", "paddle.distributed.launch", "--gpus", "0,1", SDXL_SCRIPT, *sdxl_flags]
    command += [f"--output_dir={tmp_path / 'out'}", f"--preview_output={sheet}", "--preview_samples=2"]
    cli.main(["preview", *map(str, command)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("   0  /") and " tokens), conditioning: original size " in lines[0]
    assert lines[2] == f"wrote {sheet}: 2 samples of seed 0, as the encoded cache keeps them"
    assert sheet.exists() and not (tmp_path / "out").exists()


def test_a_stream_is_shown_as_it_is_read(preview, sdxl_flags, tmp_path, capsys):
    cli.main(["pack", str(PHOTOS), str(tmp_path / "shards"), "--processes=1"])
    capsys.readouterr()
    flags = [flag for flag in sdxl_flags if not flag.startswith("--train_data_dir")]
    flags += [f"--train_shards_path_or_url=pipe:cat {tmp_path / 'shards'}/photos-00000.tar", "--max_train_samples=15"]
    cache = f"--cache_dir={tmp_path / 'cache'}"
    status, document, _ = preview(SDXL_SCRIPT, *flags, "--no_encoded_cache", "--preview_samples=4", cache)
    assert status == 0 and all("photos-00000.tar: 0000" in shown["name"] for shown in document["samples"])


def test_without_a_seed_one_is_drawn_and_printed(preview, sdxl_flags):
    flags = [flag for flag in sdxl_flags if not flag.startswith("--seed")]
    _, document, _ = preview(SDXL_SCRIPT, *flags, "--preview_samples=1")
    assert preview(SDXL_SCRIPT, *flags, "--preview_samples=1", f"--seed={document['seed']}")[1] == document


def test_mistakes_are_one_line(sdxl_flags, tmp_path, capsys):
    (tmp_path / "other.py").write_text("print('no script for training')")
    cases = {
        ("python",): "preview: no script; expected a training command",
        ("--resolution=5",): "--resolution is not a flag of this script",
        ("nowhere.py",): "preview: there is no script 'nowhere.py'",
        (tmp_path / "other.py",): "has no build_parser(); expected a training script",
        (SDXL_SCRIPT, *sdxl_flags, "--preview_sample=3"): "--preview_sample is not a flag of this script; did you mean "
        "--preview_samples?",
        (SDXL_SCRIPT, "--resolution=64"): "the following arguments are required: --pretrained_model_name_or_path",
        (
            SDXL_SCRIPT,
            *sdxl_flags,
            f"--preview_output={tmp_path}/no/where.png",
        ): "--preview_output: 'where.png' cannot be written to",
        (SDXL_SCRIPT, *sdxl_flags, "--train_data_dir=/nowhere"): "--train_data_dir: '/nowhere' is not a folder",
    }
    for argv, message in cases.items():
        assert message in refused(capsys, "preview", *argv)
