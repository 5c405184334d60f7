"""What the flags of captions do in every job that reads them."""

import ppdiffusers_train  # noqa: F401

import pytest
from PIL import Image

from ppdiffusers_train.draws import RowDraws
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
