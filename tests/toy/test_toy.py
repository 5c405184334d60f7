import ppdiffusers_train  # noqa: F401

import re

import numpy as np
import paddle
import pytest

from ppdiffusers_train.data.transforms import center_crop_square, normalize_pixels
from ppdiffusers_train.toy.models.movq import WEIGHTS, load_movq
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer, learn_merges
from ppdiffusers_train.toy.world.shapes import SEEN, WORDINGS, caption
from ppdiffusers_train.toy.world.words import vocabulary
from tests.conftest import PHOTOS


def test_tokens_are_bytes_and_come_back_as_text(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    for text in ("a red circle", "红色的圆"):
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert len(ids) == 77 and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_chosen_words_are_one_token_each_in_both_languages(tmp_path):
    tokenizer = build_tokenizer(tmp_path, vocabulary())
    for text in (*(caption(SEEN[5], wording) for wordings in WORDINGS.values() for wording in wordings), "a, outlined"):
        ids = tokenizer(text).input_ids
        assert len(ids) - 2 == len(re.findall("[a-z]+|[^a-z ]", text))
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.replace("，", ", ")
    other = "an orangutan 和一只猫"  # is still made of bytes
    assert tokenizer.decode(tokenizer(other).input_ids, skip_special_tokens=True).strip() == other


@pytest.mark.once
def test_merges_make_each_word_one_symbol():
    words = ["low", "lower", "newest", "widest", "w"]
    merges = learn_merges(words)
    for word in words:
        symbols = list(word)
        for pair in merges:
            for place in reversed(range(len(symbols) - 1)):
                if tuple(symbols[place : place + 2]) == pair:
                    symbols[place : place + 2] = ["".join(pair)]
        assert symbols == [word]
    assert len(set(merges)) == len(merges)


@pytest.fixture(scope="module")
def photographs():
    from PIL import Image

    images = [
        center_crop_square(Image.open(path).convert("RGB")).resize((64, 64)) for path in sorted(PHOTOS.glob("*.jpg"))
    ]
    return paddle.to_tensor(np.stack([normalize_pixels(image) for image in images]))


def psnr(one, other):
    """Peak signal-to-noise ratio of images in [-1, 1], in decibels."""
    return 10 * np.log10(4 / np.square(one.numpy() - other.numpy()).mean((1, 2, 3)))


@paddle.no_grad()
def test_movq_reconstructs_photographs_with_and_without_its_codebook(photographs):
    movq = load_movq()
    movq.eval()
    latents = movq.encode(photographs).latents
    assert latents.shape == [15, 4, 16, 16]
    plain = psnr(movq.decode(latents, force_not_quantize=True).sample.clip(-1, 1), photographs)
    quantized = psnr(movq(photographs).sample.clip(-1, 1), photographs)
    average = psnr(paddle.ones_like(photographs) * photographs.mean([2, 3], keepdim=True), photographs)
    assert 25 < plain.mean() > average.mean() + 8 and quantized.mean() > 24
    assert 0.5 < float(latents.std()) < 2, "latents are of about unit scale, as the noise schedule expects"


def test_movq_weights_are_small_enough_to_ship():
    assert WEIGHTS.stat().st_size <= 2_000_000


def test_the_recipe_of_the_movq_runs(tmp_path):
    from ppdiffusers_train.toy.recipes import train_movq

    train_movq.main(
        [f"--train_data_dir={PHOTOS}", "--max_train_steps=1", "--report_to=none", f"--output_dir={tmp_path}"]
    )
    assert (tmp_path / "movq.safetensors").stat().st_size == WEIGHTS.stat().st_size
