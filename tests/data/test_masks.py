"""Masked losses: where masks come from, how they move with their images, and what they do to gradients."""

import io
import json
import shutil
import tarfile

import numpy as np
import paddle
import pytest
from PIL import Image

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.transforms import fit, fit_mask, square_mask
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.objectives.losses import area_weights, huber_loss, mse_loss
from tests.conftest import encode, encoded_samples, last_error, scalars


def marked(number, size=(96, 64)):
    """An image whose red channel is its mask, and that mask: a rectangle away from the centre."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[4 : 30 + number, 8:40] = 255
    pixels = np.stack([mask, np.full_like(mask, 40 * number), mask // 2], -1)
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.fixture
def masked(tmp_path):
    """A folder of three images with a mask beside each, and in a column of the metadata."""
    folder = tmp_path / "masked"
    (folder / "areas").mkdir(parents=True)
    rows = []
    for number in range(3):
        image, mask = marked(number)
        image.save(folder / f"{number}.png")
        mask.save(folder / f"{number}.mask.png")
        mask.save(folder / "areas" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"thing {number}", "area": f"areas/{number}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(jobs, base, *flags):
    args = jobs["sd"].build_parser().parse_args([f"--pretrained_model_name_or_path={base}", "--seed=0", *flags])
    return build_dataset(args)


def shard(folder, path):
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            for name in (f"{number}.png", f"{number}.mask.png"):
                archive.add(folder / name, name)
            member, text = tarfile.TarInfo(f"{number}.txt"), b"thing"
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return path


def parquet(folder, path):
    import pyarrow
    from pyarrow import parquet

    columns = {"image": "{}.png", "area": "{}.mask.png"}
    found = {name: [(folder / form.format(n)).read_bytes() for n in range(3)] for name, form in columns.items()}
    parquet.write_table(pyarrow.table({**found, "text": ["thing"] * 3}), path)
    return path


def transparent(folder, into):
    into.mkdir()
    for number in range(3):
        image, mask = marked(number)
        image.putalpha(mask)
        image.save(into / f"{number}.png")
    return into


def test_every_source_gives_each_image_its_mask(masked, sd, sd_jobs, tmp_path):
    index = f"--index_dir={tmp_path / 'index'}"
    tar, table = shard(masked, tmp_path / "0.tar"), parquet(masked, tmp_path / "t.parquet")
    sources = [
        [f"--train_data_dir={masked}", "--mask_column=area"],  # its files are no images to train on
        [f"--train_data_dir={masked}", "--masked_loss"],
        [f"--train_shards_path_or_url={tar}", "--masked_loss"],
        [f"--train_shards_path_or_url=pipe:cat {tar}", "--masked_loss", "--max_train_samples=3"],
        [f"--dataset_name={table}", "--mask_column=area", f"--cache_dir={tmp_path / 'datasets'}"],
        [f"--train_data_dir={transparent(masked, tmp_path / 'alpha')}", "--alpha_mask", "--caption=a"],
    ]
    for flags in sources:
        rows = rows_of(sd_jobs, sd, index, *flags)
        assert len(rows) == 3, flags
        for number in range(3):
            row = rows[number]
            red, mask = np.asarray(row["image"])[:, :, 0], np.asarray(row["mask"])
            assert 0 < mask.mean() < 255 and (red[mask == 255] == 255).all(), flags
            assert "--alpha_mask" in flags or np.array_equal(red, mask), flags
        shutil.rmtree(masked / "areas", ignore_errors=True)


def test_masks_move_with_their_images():
    image, mask = marked(1, (150, 90))
    row, means = {"image": image, "mask": mask}, []
    for position in range(8):
        for how in ((32, 48), (64, 40), (8, 8)):  # the last one is scaled in part only
            draws = RowDraws(0, position)
            crop, *_ = fit(image, *how, draws, "box", False, True)
            moved = fit_mask(row, *how, draws, False, True)["mask"][0]
            assert np.abs(np.int16(np.asarray(crop)[:, :, 0]) - moved).max() <= 1
            means.append(moved.mean())
    assert len(set(means)) > 8
    square = image.crop((30, 0, 120, 90)).resize((16, 16), Image.Resampling.BOX)
    assert np.array_equal(square_mask(row, 16)["mask"][0], np.asarray(square)[:, :, 0])
    assert fit_mask({"image": image}, 8, 8, RowDraws(0, 0), True, False) == {}


def test_the_loss_outside_a_mask_has_the_weight_that_was_given():
    prediction = paddle.to_tensor(np.float32([[[[1, 2], [3, 4]]]]), stop_gradient=False)
    target, mask = paddle.zeros([1, 1, 2, 2]), paddle.to_tensor(np.float32([[[[1, 0.5], [0, 0]]]]))
    loss = mse_loss(prediction, target, area=area_weights(mask, 0.0))
    assert float(loss) == (1 + 0.5 * 4) / 4
    loss.backward()
    assert prediction.grad.numpy().tolist() == [[[[0.5, 0.5], [0, 0]]]]  # 2 · area · error / 4
    assert float(mse_loss(prediction, target, area=area_weights(mask, 0.2))) == pytest.approx(
        (1 + 0.6 * 4 + 0.2 * 9 + 0.2 * 16) / 4
    )
    c = paddle.full([1], 3.0)
    assert float(huber_loss(prediction, target, c, True, area=area_weights(mask, 0.0))) == pytest.approx(
        2 * ((10**0.5 - 3) + 0.5 * (13**0.5 - 3)) / 4
    )
    assert area_weights(None, 0.3) is None


@pytest.mark.parametrize("job", ["sd", "lora_sdxl", "lora_sd3", "decoder"])
def test_jobs_train_on_the_area_alone(job, masked, build_sd_module, build_sdxl_module, build_sd3_module, build):
    builders = {"sd": build_sd_module, "lora_sdxl": build_sdxl_module, "lora_sd3": build_sd3_module, "decoder": build}
    flags = [f"--train_data_dir={masked}", "--mask_column=area", "--resolution=64"]
    module = builders[job](job, *flags)
    model = getattr(module, module.trained)
    encoded, seen = encode(module, build_dataset(module.args), [0, 1]), []
    mask = encoded["mask"]
    assert mask.shape == [2, 1, *encoded["latents"].shape[-2:]] and 0 < float(mask.mean()) < 1
    hook = model.register_forward_post_hook(lambda _, __, output: seen.append(first_of(output)))
    for weight in (0.0, 0.5):
        module.args.masked_area_weight = weight
        module(encoded, Draws(0, [0, 1])).backward()
        gradient = seen[-1].grad.numpy()[:, : encoded["latents"].shape[1]]
        outside = np.broadcast_to(mask.numpy() == 0, gradient.shape)
        assert outside.any() and (gradient[outside] == 0).all() == (weight == 0)
        assert (gradient[~outside] != 0).any()
    hook.remove()


def first_of(output):
    """The prediction of a model, whose gradient is kept."""
    prediction = output.sample if hasattr(output, "sample") else output[0]
    prediction.retain_grads()
    return prediction


def test_masks_are_cached_with_their_samples(masked, train_sd, photos, capsys):
    """The same losses from the cache as without; a changed mask is encoded anew; class images count as a whole."""
    flags = [f"--train_data_dir={masked}", "--mask_column=area", "--center_crop"]
    held_out = [f"--validation_data_dir={masked}", "--validation_loss_steps=3"]
    runs = (("a", []), ("b", ["--encoded_cache"]))
    plain, cached = (train_sd("lora_sd", *flags, *held_out, *more, out=out) for out, more in runs)
    assert scalars(plain) == scalars(cached)
    assert scalars(plain, "validation/loss") == scalars(cached, "validation/loss")
    assert len(encoded_samples(cached / "encoded")) == 3
    Image.new("L", (96, 64), 255).save(masked / "areas" / "1.png")
    train_sd("lora_sd", *flags, f"--encoded_cache_dir={cached / 'encoded'}", "--num_class_images=1",
             f"--class_data_dir={photos}", "--class_prompt=a photo", out="c")  # fmt: skip
    samples = encoded_samples(cached / "encoded")
    assert len(samples) == 5  # the changed one, and a class image
    assert sorted(float(sample["mask"].mean()) == 1 for sample in samples.values()) == [False] * 3 + [True] * 2
    with pytest.raises(SystemExit):
        train_sd("lora_sd", *flags, *held_out, "--resume_from_checkpoint=latest", "--max_train_steps=4", out="b")
    assert "images (a hash of the contents of all)" in last_error(capsys)


MISTAKES = {
    "missing": "0.png (row 0): it has no mask; expected 0.mask.png, or a --mask_column",
    "size": "0.png (row 0), its mask: 5 x 5 pixels; expected 96 x 64, the size of the image",
    "text": "0.png (row 0), its mask: the image cannot be read: it is no image of a known format",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_mask_is_named_before_training(mistake, masked, train_sd, capsys):
    mask = masked / "0.mask.png"
    mask.unlink()
    if mistake == "size":
        Image.new("L", (5, 5)).save(mask)
    elif mistake == "text":
        mask.write_text("no image")
    shutil.rmtree(masked / "areas")
    with pytest.raises(SystemExit) as end:
        train_sd("sd", f"--train_data_dir={masked}", "--masked_loss")
    error = last_error(capsys)
    assert end.value.code == 2 and MISTAKES[mistake] in error


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--masked_area_weight=0.5"], "--masked_area_weight: there are no masks"),
        (["--alpha_mask", "--mask_column=area"], "--alpha_mask: there is --mask_column as well"),
        (["--mask_column=nothing"], "--mask_column: "),
    ],
)
def test_contradicting_flags_are_refused(flags, expected, masked, train_sd, capsys):
    with pytest.raises(SystemExit) as end:
        train_sd("sd", f"--train_data_dir={masked}", *flags)
    assert end.value.code == 2 and expected in last_error(capsys)
