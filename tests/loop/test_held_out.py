"""The loss of samples that are not trained on: which they are, what is computed, and that training does not notice."""

import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ppdiffusers_train.data.dataset import build_dataset, divide
from ppdiffusers_train.data.tables import TableRows
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.module import encode_batch
from tests.conftest import PHOTOS, last_error, module_class, same, scalars, weights

LOSS, OF_AVERAGES = "validation/loss", "validation/loss_ema"
STEPS = ["--max_train_steps=4", "--validation_loss_steps=2"]
OTHERS = ("coins.jpg", "moon.jpg", "retina.jpg")  # photographs that the tests do not train on


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A folder of three photographs that are not trained on."""
    folder = tmp_path_factory.mktemp("others")
    rows = [json.loads(line) for line in (PHOTOS / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        if row["file_name"] in OTHERS:
            shutil.copy(PHOTOS / row["file_name"], folder)
            (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    return folder


def test_the_loss_is_the_mean_over_the_same_draws_each_time_and_changes_no_bit_of_the_run(
    train_sd, build_sd_module, others
):
    flags = ["--random_flip", "--snr_gamma=5", "--use_ema", "--max_train_steps=4"]
    plain = train_sd("sd", *flags, out="plain")
    flags += STEPS + [f"--validation_data_dir={others}"]
    out = train_sd("sd", *flags, "--checkpointing_steps=2", "--dataloader_num_workers=2")
    assert same(weights(plain), weights(out)) and scalars(plain) == scalars(out)
    resumed = train_sd("sd", *flags, f"--resume_from_checkpoint={out / 'checkpoint-2'}", out="resumed")
    for tag in (LOSS, OF_AVERAGES):
        assert len(scalars(out, tag)) == 3 and scalars(out, tag)[1:] == scalars(resumed, tag)
    assert scalars(out, LOSS)[0] == scalars(out, OF_AVERAGES)[0]

    module = build_sd_module("sd", *flags)
    module.load_weights(str(out / "checkpoint-4"))
    module.eval()
    rows, losses = build_dataset(module.args).held_out, []
    assert sorted(row["name"].split("/")[-1].split()[0] for row in map(rows.__getitem__, range(3))) == sorted(OTHERS)
    for position in range(51):  # a whole number of rounds, 50 losses at least
        sample = module.preprocess(rows[position % 3], RowDraws(2**63, position % 3))
        encoded = encode_batch(module, {name: paddle.to_tensor(array[None]) for name, array in sample.items()})
        with paddle.no_grad():
            losses.append(module(encoded, Draws(2**63, [position])).item())
    assert scalars(out, LOSS)[-1] == pytest.approx(np.mean(losses), rel=1e-6) != scalars(out, OF_AVERAGES)[-1]


@pytest.mark.once
def test_from_a_cache_they_are_encoded_once_and_the_next_run_needs_no_encoder(train_sd, capsys):
    flags = ["--encoded_cache", "--center_crop", "--validation_split=0.3", *STEPS]
    out = train_sd("sd", *flags)
    assert "7 of 7 samples are still to be encoded" in capsys.readouterr().out, "five to train on and two"
    again = train_sd("sd", *flags, f"--encoded_cache_dir={out / 'encoded'}", out="again")
    assert "0 of 7 samples are still to be encoded" in capsys.readouterr().out
    online = train_sd("sd", *flags, "--no_encoded_cache", out="online")
    assert scalars(out, LOSS) == scalars(again, LOSS) == scalars(online, LOSS)


@pytest.mark.once
@given(size=st.integers(2, 300), share=st.floats(0.001, 0.999), seed=st.integers(0, 2**63 - 1))
def test_a_share_is_disjoint_from_the_rest_and_depends_on_the_seed_alone(size, share, seed):
    rows = Numbered(size)
    if max(1, round(share * size)) == size:
        return
    (rest, chosen), (_, again) = divide(rows, share, seed), divide(rows, share, seed)
    assert sorted([*rest.numbers, *chosen.numbers]) == list(range(size)) and chosen.numbers == again.numbers
    assert len(chosen.numbers) == max(1, round(share * size))


class Numbered(TableRows):
    """Rows that are numbers."""

    def __init__(self, numbers):
        self.numbers = list(range(numbers)) if isinstance(numbers, int) else numbers

    def __len__(self):
        return len(self.numbers)

    def select(self, indices):
        return Numbered([self.numbers[index] for index in indices])


def folder_with_splits(folder):
    """Images in `train` and `validation`, whose captions are in one file above them."""
    lines = []
    for name in ("train/a.png", "train/b.png", "validation/c.png", "test/d.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (len(lines) * 40, 0, 0)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.once
def test_without_other_flags_they_are_those_of_the_data_s_own_split(build_sd_module, tmp_path):
    folder = folder_with_splits(tmp_path)
    for flag in ("--train_data_dir", "--dataset_name"):
        args = build_sd_module("sd", f"{flag}={folder}", "--validation_loss_steps=2").args
        args.train_data_dir = None if flag == "--dataset_name" else args.train_data_dir
        rows = build_dataset(args)
        assert rows.stored_captions(0, 2) == ["train/a.png", "train/b.png"] and len(rows) == 2
        assert rows.held_out.stored_captions(0, 1) == ["validation/c.png"] and len(rows.held_out) == 1


@pytest.mark.once
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--validation_loss_steps=2"], "--validation_loss_steps: the data have no split named validation"),
        (["--validation_split=0.1"], "--validation_split: expected --validation_loss_steps N as well, which uses it"),
        (["--validation_split=0.99", "--validation_loss_steps=2"], "0.99 of 7 samples leaves none to train on"),
        (["--validation_split=1", "--validation_loss_steps=2"], "'1' is not a number between 0 and 1"),
        (
            ["--validation_data_dir=none", "--validation_loss_steps=2"],
            "--validation_data_dir: 'none' is not a folder",
        ),
        (
            ["--validation_data_dir=x", "--validation_split=0.1", "--validation_loss_steps=2"],
            "--validation_split: there is --validation_data_dir as well; expected one of them",
        ),
    ],
)
def test_a_mistake_is_one_line(train_sd, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_sd("sd", *flags)
    assert stopped.value.code == 2 and message in last_error(capsys)


@pytest.mark.once
def test_bad_images_and_those_that_are_trained_on_are_named(train_sd, others, photos, tmp_path, capsys):
    folder = shutil.copytree(others, tmp_path / "data")
    (folder / "moon.jpg").write_bytes(b"no image")
    shutil.copy(next(photos.glob("*.jpg")), folder / "copy.jpg")
    train_sd("sd", "--max_train_steps=1", "--validation_loss_steps=1", f"--validation_data_dir={folder}", "--caption=x")
    said = capsys.readouterr().out
    assert "the mean of 51 losses of 3 samples; not used: 1 sample, for example" in said and "moon.jpg" in said
    assert "1 image of these are also trained on, for example" in said and "copy.jpg" in said


@pytest.mark.once
@pytest.mark.parametrize("interval", [9, 2])
def test_a_sample_that_breaks_during_the_run_costs_no_step(
    train_sd, sd_jobs, others, tmp_path, capsys, monkeypatch, interval
):
    folder, training = shutil.copytree(others, tmp_path / "others"), module_class(sd_jobs["sd"])
    forward = training.forward

    def break_one(self, *inputs):
        if self.training:
            (folder / "moon.jpg").write_bytes(b"")
        return forward(self, *inputs)

    monkeypatch.setattr(training, "forward", break_one)
    flags = [f"--validation_data_dir={folder}", "--validation_loss_steps=2", f"--checkpointing_steps={interval}"]
    with pytest.raises(SystemExit) as stopped:
        train_sd("sd", *flags, "--max_train_steps=3")
    message = last_error(capsys)
    assert stopped.value.code == 2 and "moon.jpg" in message and (tmp_path / "out" / "checkpoint-2").is_dir()
    assert ("; wrote checkpoint-2 before it" in message) == (interval == 9)


@pytest.mark.once
def test_other_samples_after_a_resume_are_told(train_sd, others, tmp_path, capsys):
    folder = shutil.copytree(others, tmp_path / "others")
    flags = [f"--validation_data_dir={folder}", "--validation_loss_steps=1", "--resume_from_checkpoint=latest"]
    for steps, says in ((1, False), (2, False), (3, True), (4, False)):
        if says:
            (folder / "moon.jpg").unlink()
        train_sd("sd", *flags, f"--max_train_steps={steps}")
        assert ("these are other samples than the checkpoint's" in capsys.readouterr().out) == says
