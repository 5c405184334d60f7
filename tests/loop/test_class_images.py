"""Prior preservation: class images beside the samples, in any division of the work, and how missing ones come about."""

import ppdiffusers_train  # noqa: F401

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ppdiffusers_train.data.class_images import ClassImages, WithClassImages, class_images
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.order import CLASS, SampleOrder, micro_batches
from ppdiffusers_train.draws import Draws
from ppdiffusers_train.loop.step import set_training_mode
from ppdiffusers_train.reporting.trackers import clean_tag
from tests.conftest import encode, last_error, optimizer_state, same, scalars, weights

COUNT = 5


@pytest.fixture(scope="module")
def photos_of_class(tmp_path_factory):
    """A folder of five class images."""
    folder = tmp_path_factory.mktemp("class")
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def class_folder(tmp_path):
    """An empty folder for class images."""
    (tmp_path / "class").mkdir()
    return tmp_path / "class"


def prior(folder, count=COUNT):
    """Flags of a run with class images."""
    return [f"--class_data_dir={folder}", "--class_prompt=a dog", f"--num_class_images={count}"]


# The order.


@given(
    size=st.integers(1, 30), count=st.integers(1, 30), batch=st.integers(1, 5), world=st.integers(1, 5),
    per_rank=st.integers(1, 6), seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
@pytest.mark.once
def test_each_sample_has_a_class_image_whoever_trains_it_and_all_come_in_turn(
    size, count, batch, world, per_rank, seed
):
    order, seen, windows = (
        SampleOrder(seed, size, class_rows=count),
        [],
        SampleOrder(seed, size).windows(0, per_rank * world),
    )
    for window in (next(windows) for _ in range(12)):
        beside = [order.class_window(window)[rank::world] for rank in range(world)]
        batches = [micro_batches(order.class_window(window), rank, world, batch) for rank in range(world)]
        assert [[p for part in parts for p in part] for parts in batches] == list(map(list, beside))
        assert [CLASS + p for p in window] == sorted(p for part in beside for p in part)
        seen += [order.row(CLASS + p) for p in window]
    assert all(size <= row < size + count for row in seen)
    whole = len(seen) // count * count
    assert set(Counter(seen[:whole]).values()) <= {whole // count}, "each as often as any other"
    assert [order.row(p) for p in range(size)] == [SampleOrder(seed, size).row(p) for p in range(size)]


# The loss.


@pytest.mark.once
def test_the_loss_is_the_mean_over_the_samples_plus_the_weight_times_that_over_the_class_images(
    train_sd, build_sd_module, photos_of_class
):
    flags = ["--center_crop", "--train_batch_size=3", "--max_train_steps=1", *prior(photos_of_class)]
    out = train_sd("sd", *flags, "--prior_loss_weight=0.25", "--debug_loss")
    module = build_sd_module("sd", *flags)
    rows = build_dataset(module.args)
    both = WithClassImages(rows, ClassImages(str(photos_of_class), [f"{n}.png" for n in range(COUNT)], "a dog"))
    order = SampleOrder(0, len(rows), class_rows=COUNT)
    set_training_mode(module)
    losses = []
    for start in (0, CLASS):
        positions = [start, start + 1, start + 2]
        encoded = encode(module, both, map(order.row, positions))
        losses.append(module(encoded, Draws(0, positions)))
    total = losses[0] + 0.25 * losses[1]
    total.backward()
    norm = np.sqrt(sum((p.grad.numpy() ** 2).sum() for p in module.trainable_parameters()))
    assert scalars(out) == pytest.approx([total.item()], rel=1e-5)
    assert scalars(out, "train/gradient_norm") == pytest.approx([norm], rel=1e-4)
    for start, loss in zip((0, CLASS), losses):
        tag = clean_tag(f"loss_for/{both.name(order.row(start + 1))}")
        assert scalars(out, tag) == pytest.approx([loss.item()], rel=1e-5)


def test_cache_resume_and_accumulation_train_alike(train_sd, photos_of_class):
    flags = ["--center_crop", "--max_train_steps=4", "--adam_epsilon=1e-4", *prior(photos_of_class)]
    plain = train_sd("sd", *flags, "--checkpointing_steps=2", out="plain")
    cached = train_sd("sd", *flags, "--encoded_cache", out="cached")
    resumed = train_sd("sd", *flags, f"--resume_from_checkpoint={plain / 'checkpoint-2'}", out="resumed")
    parts = train_sd("sd", *flags, "--train_batch_size=1", "--gradient_accumulation_steps=2", out="parts")
    without = train_sd("sd", *flags, "--no_with_prior_preservation", out="without")
    assert scalars(plain) == scalars(cached) and same(weights(plain), weights(cached))
    assert scalars(plain)[2:] == scalars(resumed) and same(weights(plain), weights(resumed))
    assert same(*(optimizer_state(folder / "checkpoint-4") for folder in (plain, resumed)))
    assert scalars(plain) == pytest.approx(scalars(parts), rel=1e-4)
    assert scalars(plain)[0] > 1.5 * scalars(without)[0]


@pytest.mark.once
def test_buckets_give_each_class_image_its_own_size(train_sd, class_folder):
    for number, size in enumerate([(60, 20), (20, 60), (30, 30)]):
        Image.new("RGB", size, "red").save(class_folder / f"{number}.png")
    out = train_sd("sd", "--aspect_ratio_buckets", "--resolution=64", *prior(class_folder, 3))
    assert len(scalars(out)) == 2


# Missing images.


@pytest.mark.once
def test_missing_images_are_generated_and_the_same_again_after_a_kill(train_sd, tmp_path, capsys):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "own.jpg")
    flags = ["--max_train_steps=1", "--validation_inference_steps=2", "--encoded_cache", *prior(folder, 4)]
    out = train_sd("sd", *flags)
    files = {file.name: file.read_bytes() for file in folder.glob("*.*g")}
    assert sorted(files) == ["class-000000.png", "class-000001.png", "class-000002.png", "own.jpg"]
    assert len(set(files.values())) == 4, "each has a seed of its own"
    assert "3 class images of 4 are still to be generated" in capsys.readouterr().out
    kept = (folder / "class-000002.png").stat().st_mtime_ns
    for name in ("class-000000.png", "class-000001.png"):
        (folder / name).unlink()
    train_sd("sd", *flags, f"--encoded_cache_dir={out / 'encoded'}", out="again")
    assert {file.name: file.read_bytes() for file in folder.glob("*.*g")} == files
    assert (folder / "class-000002.png").stat().st_mtime_ns == kept
    assert "2 class images of 4 are still to be generated" in capsys.readouterr().out
    train_sd("sd", *flags, f"--encoded_cache_dir={out / 'encoded'}", out="third")
    said = capsys.readouterr().out
    assert "generated" not in said
    assert "0 of 11 samples are still to be encoded" in said, "models that have generated are no other encoders"


def test_images_that_are_there_come_first_and_no_more_than_asked(photos_of_class, tmp_path):
    assert class_images(photos_of_class, 3) == (["0.png", "1.png", "2.png"], [])
    names, missing = class_images(photos_of_class, 7)
    assert names[5:] == ["class-000000.png", "class-000001.png"] and missing == [0, 1]
    assert class_images(tmp_path / "none", 2)[1] == [0, 1]


@pytest.mark.once
@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--class_prompt=a dog"],
            "--class_data_dir: missing; --with_prior_preservation needs --class_data_dir DIR and",
        ),
        (["--with_prior_preservation", "--class_data_dir=x"], "--class_prompt: missing"),
        ([*prior("x"), "--max_bad_samples=1"], "--max_bad_samples: expected 0 with class images"),
        ([*prior("x"), "--train_data_dir=x/y"], "and --train_data_dir are one folder, or one lies in the other"),
        ([*prior("x"), "--prior_loss_weight=0"], "'0' is not a number above 0"),
        ([*prior("x"), "--output_dir=x/out"], "lies in --class_data_dir"),
    ],
)
def test_a_mistake_is_one_line(train_sd, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_sd("sd", *flags)
    assert stopped.value.code == 2 and message in last_error(capsys)


@pytest.mark.once
def test_a_command_of_diffusers_dreambooth_script_trains(sd_jobs, sd, photos_of_class, tmp_path):
    out = tmp_path / "out"
    words = [f"--pretrained_model_name_or_path={sd}", f"--instance_data_dir={photos_of_class}"]
    words += [f"--class_data_dir={tmp_path / 'c'}", f"--output_dir={out}"]
    words += """--with_prior_preservation --prior_loss_weight=1.0 --instance_prompt=sks --class_prompt=dog
        --resolution=32 --train_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing --use_8bit_adam
        --learning_rate=5e-6 --lr_scheduler=constant --lr_warmup_steps=0 --num_class_images=2 --max_train_steps=2
        --validation_inference_steps=2""".split()
    sd_jobs["sd"].main(words)
    assert len(list((tmp_path / "c").glob("class-*.png"))) == 2 and len(scalars(out)) == 2
