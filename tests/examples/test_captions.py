"""What the flags of captions do in every job that reads them."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
from PIL import Image

from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.module import encode_batch
from tests.conftest import builder, encoded_samples, last_error

pytestmark = pytest.mark.once

ROW = {"image": Image.new("RGB", (64, 64)), "caption": "red, green, blue, cat"}


def tokens(module, position):
    arrays = module.preprocess(ROW, RowDraws(0, position))
    return tuple(tuple(ids.tolist()) for name, ids in sorted(arrays.items()) if name.startswith("input_ids"))


@pytest.fixture(params=["prior", "sd", "sdxl", "sd3", "lcm_sd", "lcm_sdxl"])
def build_any(request, kandinsky_jobs, decoder_flags, lcm_jobs, sd, sdxl, photos):
    """`build_any(*flags)` is a job's training module."""
    name = request.param
    if name == "prior":
        return lambda *flags: builder(kandinsky_jobs, decoder_flags)(name, *flags)
    if name.startswith("lcm"):
        teacher = {"lcm_sd": sd, "lcm_sdxl": sdxl}[name]
        given = [f"--pretrained_teacher_model={teacher}", f"--train_data_dir={photos}", "--resolution=32", "--seed=0"]
        return lambda *flags: builder(lcm_jobs, given)(name.removeprefix("lcm_"), *flags)
    build = request.getfixturevalue(f"build_{name}_module")
    return lambda *flags: build(name, *flags)


def test_each_flag_varies_the_caption_that_encoders_read_and_the_caches_key(build_any):
    plain = build_any()
    whole, settings = {tokens(plain, position) for position in range(20)}, [plain.encoding_settings()]
    assert len(whole) == 1
    keep = ["--shuffle_tags", "--keep_tags=3"]
    for flags in (["--shuffle_tags"], ["--tag_dropout=0.5"], keep, ["--caption_dropout=0.5"]):
        module = build_any(*flags)
        found = {tokens(module, position) for position in range(20)}
        assert (found == whole) if flags is keep else len(found) > 1, flags
        settings.append(module.encoding_settings())
    assert all(one != other for index, one in enumerate(settings) for other in settings[:index])


def test_cached_captions_are_variants(train_sd, capsys):
    flags = ["--encoded_cache", "--center_crop", "--shuffle_tags", "--max_train_steps=1", "--cache_variants=3"]
    assert len(encoded_samples(train_sd("sd", *flags) / "encoded")) == 21
    assert "--cache_variants 3: no effect" not in capsys.readouterr().out


def test_more_layers_than_there_are_cannot_be_skipped(train_sd, train_sdxl, capsys):
    for run, name in ((train_sd, "sd"), (train_sdxl, "sdxl")):
        with pytest.raises(SystemExit) as stopped:
            run(name, "--clip_skip=12")
        assert stopped.value.code == 2
        assert "--clip_skip: 12 of 2 layers; expected less than 2" in last_error(capsys)


@pytest.mark.parametrize("job", ["sd", "sdxl"])
def test_long_captions_are_encoded_in_chunks(job, build_sd_module, build_sdxl_module):
    """Each chunk as the encoder reads it alone; the pooled embedding is that of the first."""
    build = {"sd": build_sd_module, "sdxl": build_sdxl_module}[job]
    long, plain = build(job, "--max_token_length=150"), build(job)
    size, words = plain.tokenizer.model_max_length - 2, [f"w{n}" for n in range(90)]
    caption = " ".join(words)
    ids = plain.tokenizer(caption)["input_ids"][1:-1]
    assert len(ids) > size
    parts = [plain.tokenizer.decode(ids[start : start + size]) for start in (0, size)]
    assert [plain.tokenizer(part)["input_ids"][1:-1] for part in parts] == [ids[:size], ids[size : 2 * size]]
    row = {"image": Image.new("RGB", (64, 64)), "name": "x"}

    def encoded(module, caption):
        sample = module.preprocess({**row, "caption": caption}, RowDraws(0, 0))
        return encode_batch(module, {name: paddle.to_tensor(value[None]) for name, value in sample.items()})

    whole, first, second = encoded(long, caption), *(encoded(plain, part) for part in parts)
    expected = np.concatenate([first["prompt_embeds"].numpy(), second["prompt_embeds"].numpy()], 1)
    np.testing.assert_allclose(whole["prompt_embeds"].numpy(), expected, atol=1e-5)
    if job == "sdxl":
        pooled = "pooled_prompt_embeds"
        np.testing.assert_allclose(whole[pooled].numpy(), first[pooled].numpy(), atol=1e-5)
    assert np.isfinite(float(long(whole, Draws(0, [0]))))


def test_t5_reads_more_tokens_than_clip_where_it_is_asked_to(build_sd3_module):
    caption = " ".join(["red"] * 60 + ["circle"] * 60)
    row = {"image": Image.new("RGB", (64, 64)), "caption": caption, "name": "x"}
    plain, long = (build_sd3_module("sd3", *flags) for flags in ([], ["--max_sequence_length=100"]))
    ids = [module.preprocess(row, RowDraws(0, 0)) for module in (plain, long)]
    assert len(ids[1]["input_ids_3"]) == 100 and len(ids[1]["input_ids"]) == len(ids[0]["input_ids_3"])
    encoded = encode_batch(long, {name: paddle.to_tensor(value[None]) for name, value in ids[1].items()})
    assert encoded["prompt_embeds"].shape[1] == len(ids[0]["input_ids"]) + 100
    assert np.isfinite(float(long(encoded, Draws(0, [0]))))
