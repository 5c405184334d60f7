"""Generated class images: what they depend on, and what may be trained on them."""

import ppdiffusers_train  # noqa: F401

import json
import os
import shutil

import pytest
from PIL import Image

from ppdiffusers_train.models.qwen_image.loading import QwenImageFolder
from tests.conftest import last_error, runner, scalars, short_run
from tests.toy_pipelines import build_sd

pytestmark = pytest.mark.once
STEP = ["--max_train_steps=1", "--validation_inference_steps=2"]


def prior(folder, count=2):
    """Flags of a run with class images."""
    return [*STEP, f"--class_data_dir={folder}", "--class_prompt=a dog", f"--num_class_images={count}"]


@pytest.fixture(scope="module")
def other_sd(tmp_path_factory):
    """A Stable Diffusion like that of `sd`, with other weights, which predicts v."""
    return build_sd(tmp_path_factory.mktemp("other"), seed=1, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def made(sd_jobs, sd, photos, tmp_path_factory):
    """A folder of two generated class images, not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    flags = [f"--pretrained_model_name_or_path={sd}", *short_run(photos), "--resolution=32"]
    runner(sd_jobs, flags, folder)("sd", *prior(folder / "class"))
    return folder / "class"


@pytest.fixture
def generated(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "class")


@pytest.fixture
def refused(train_sd, capsys):
    """`refused(*flags)` is the line with which a run ends before its first step."""

    def run(*flags):
        with pytest.raises(SystemExit) as stopped:
            train_sd("sd", *flags, out="refused")
        assert stopped.value.code == 2
        return last_error(capsys)

    return run


def contents(folder):
    """{name: bytes} of the images of a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_any_run_goes_on_with_images_of_the_same_base_wherever_it_lies(train_sd, generated, sd, tmp_path):
    files = contents(generated)
    (generated / "class-000001.png").unlink()
    moved = shutil.copytree(sd, tmp_path / "moved")
    train_sd("lora_sd", *prior(generated), "--seed=7", f"--pretrained_model_name_or_path={moved}/", out="second")
    assert contents(generated) == files, "the seed of an image is not that of the run"


def test_images_of_another_prompt_flag_or_base_are_refused_also_if_none_is_missing(generated, refused, other_sd, sd):
    way_out = "expected another folder, or this one without class-*.png"
    said = refused(*prior(generated), "--class_prompt=a cat")
    assert f"images that were generated with --class_prompt a dog, now it is a cat; {way_out}" in said
    assert "with --resolution 32, now it is 64" in refused(*prior(generated, 1), "--resolution=64")
    assert "with --validation_inference_steps 2, now it is 3" in refused(
        *prior(generated, 3), "--validation_inference_steps=3"
    )
    for part in ("vae", "unet", "scheduler"):
        mixed = shutil.copytree(sd, generated.parent / part)
        shutil.rmtree(mixed / part)
        shutil.copytree(other_sd / part, mixed / part)
        said = refused(*prior(generated), f"--pretrained_model_name_or_path={mixed}")
        assert f"by another base: its {part} differs" in said


def test_a_damaged_record_is_one_line(generated, refused, train_sd):
    record = generated / "generated.json"
    record.unlink()
    record.mkdir()
    said = "has class-000000.png, and a generated.json that cannot be read"
    assert said in refused(*prior(generated))
    record.rmdir()
    of_an_earlier_version = '{"class_prompt": "a dog", "pretrained_model_name_or_path": "sd"}'
    for content in ("{oops", "", "[]", "[[1]]", '{"flags": 1, "base": {}}', of_an_earlier_version):
        record.write_text(content)
        assert said in refused(*prior(generated))
    for image in generated.glob("*.png"):
        image.unlink()
    train_sd("sd", *prior(generated), out="anew")
    assert json.loads(record.read_text())["flags"]["class_prompt"] == "a dog"


def test_images_without_a_record_are_used_but_no_others_are_added(generated, refused, train_sd):
    (generated / "generated.json").unlink()
    assert len(scalars(train_sd("sd", *prior(generated), out="used"))) == 1
    assert "no generated.json says what has generated it" in refused(*prior(generated, 3))
    assert sorted(contents(generated)) == ["class-000000.png", "class-000001.png"]


def test_an_untrained_base_generates_by_its_own_process_alone(refused, build_sd_module, build_sd3_module, other_sd, sd):
    folder = other_sd / "class"
    said = refused(*prior(folder), "--prediction_type=v_prediction")
    assert "--prediction_type v_prediction: the base's scheduler says otherwise, so 2 class images cannot be" in said
    assert "cannot be generated" in refused(*prior(folder), "--prediction_type=v_prediction", "--dry_run")
    assert not folder.exists() or not list(folder.iterdir()), "nothing is written"
    v_base = f"--pretrained_model_name_or_path={other_sd}"
    assert build_sd_module("lora_sd", v_base, "--prediction_type=v_prediction").changed_process() == ""
    assert build_sd_module("sd", v_base, "--rescale_betas_zero_snr").changed_process() == "--rescale_betas_zero_snr"
    assert build_sd3_module("sd3").changed_process() == ""
    assert build_sd3_module("sd3", "--shift=7").changed_process() == "--shift 7.0"


def test_all_of_a_pipeline_counts_also_what_a_job_does_not_train_with(build, sdxl, build_sdxl_module, qwen):
    prior_job, decoder_job = build("prior"), build("decoder")
    assert prior_job.generation_files() == decoder_job.generation_files()
    assert {"unet", "movq", "scheduler", "prior_prior", "prior_tokenizer"} <= prior_job.generation_files().keys()
    files = build_sdxl_module("lora_sdxl").generation_files()
    assert files["scheduler"] == [sdxl / "scheduler" / "scheduler_config.json"] and len(files["unet"]) > 1
    qwen_parts = QwenImageFolder(qwen).files()
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} == qwen_parts.keys()


def test_a_class_image_that_cannot_be_used_says_what_to_do(generated, refused, train_sd, photos, tmp_path):
    way_out = "delete this class image, and one is generated anew, or replace it"
    kept = contents(generated)
    for content in (b"", kept["class-000001.png"][:100], kept["class-000001.png"][:-300]):
        (generated / "class-000001.png").write_bytes(content)
        said = refused(*prior(generated))
        assert "class-000001.png (class image 1): the image cannot be read" in said and way_out in said
        assert "max_bad_samples" not in said
    (generated / "class-000001.png").unlink()
    os.symlink(tmp_path / "nowhere", generated / "class-000001.png")
    said = refused(*prior(generated))
    assert "class-000001.png (class image 1): the image cannot be read" in said and way_out in said
    (generated / "class-000001.png").unlink()
    os.symlink(tmp_path / "nowhere", generated / "own.png")
    assert "own.png (class image 0): the image cannot be read" in refused(*prior(generated))
    (generated / "own.png").unlink()
    train_sd("sd", *prior(generated), out="anew")
    assert contents(generated) == kept
    data = shutil.copytree(photos, tmp_path / "data")
    next(data.glob("*.jpg")).write_bytes(b"no image")
    said = refused(*prior(generated), f"--train_data_dir={data}")
    assert "1 of 7 samples cannot be used" in said and "with class images, no sample can be left out" in said
    assert "max_bad_samples" not in said


def test_flags_of_class_images_without_effect_are_named(train_sd, capsys):
    train_sd("sd", *STEP, "--num_class_images=9", "--prior_loss_weight=0.5")
    said = capsys.readouterr().out
    assert "--num_class_images 9: no effect without class images" in said
    assert "--prior_loss_weight 0.5: no effect without class images" in said and said.count(": no effect") == 2
    train_sd("sd", *prior("nowhere"), "--no_with_prior_preservation", out="ignored")
    assert "--class_prompt a dog: no effect without class images" in capsys.readouterr().out


def test_a_dry_run_counts_class_images_and_writes_none(train_sd, tmp_path, capsys):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "own.png")
    train_sd("sd", *prior(folder, 5), "--dry_run", "--cache_variants=2")
    said = capsys.readouterr().out
    assert "4 class images would be generated" in said
    assert "7 samples and 5 class images with 12 captions\n  1 step of 2 samples and as many class images: 0.2" in said
    assert "12 x 2 encoded samples" in said and "prior preservation: 5 class images" in said
    assert os.listdir(folder) == ["own.png"]


def test_flags_of_old_commands_are_taken_and_named(train_sd, generated, tmp_path, capsys):
    more = ["--sample_batch_size=1", "--set_grads_to_none", "--prior_generation_precision=fp32"]
    train_sd("sd", *prior(generated), *more)
    said = capsys.readouterr().out
    assert "--sample_batch_size 1: no effect, class images are generated one at a time" in said
    assert "--set_grads_to_none: no effect" in said and "--prior_generation_precision" not in said
    train_sd("sd", *STEP, *more, out="without")
    assert "--prior_generation_precision fp32: no effect without class images" in capsys.readouterr().out
