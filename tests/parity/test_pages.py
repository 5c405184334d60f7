"""Pages with snippets for diffusers are read where it is installed: their results open there, and generate images."""

import ppdiffusers_train  # noqa: F401  (before paddle)

import diffusers
import pytest

from tests.conftest import copy_photos
from tests.docs.pages import code_blocks, executable_pages, is_for_torch
from tests.docs.reader import DECODER, PRIOR, SD, SD3, SDXL, Reader, generate_small_images, job, published

# {published name: the script that can write this model for diffusers}
SCRIPTS = {
    PRIOR: "train_text_to_image_prior.py",
    DECODER: "train_text_to_image_decoder.py",
    SDXL: "train_text_to_image_sdxl.py",
    SD3: "train_text_to_image_sd3.py",
    SD: "train_text_to_image.py",
}


def snippets(page):
    """A page's snippets for diffusers."""
    return [code for language, code, _ in code_blocks(page) if language == "python" and is_for_torch(code)]


@pytest.fixture(scope="module")
def models(kandinsky, sdxl, sd3, sd, qwen):
    return published(kandinsky, sdxl, sd3, sd, qwen)


@pytest.fixture(scope="module")
def for_diffusers(models, tmp_path_factory):
    """`for_diffusers(name)` is a folder with the unchanged model of that published name, for diffusers."""
    photos = copy_photos(tmp_path_factory.mktemp("data") / "photos", 1)
    folders = {}

    def convert(name):
        if name not in folders:
            bases = [f"--pretrained_model_name_or_path={models[name]}"]
            if name in (PRIOR, DECODER):
                bases = [f"--pretrained_prior_model_name_or_path={models[PRIOR]}"]
                bases += [f"--pretrained_decoder_model_name_or_path={models[DECODER]}"]
            folders[name] = tmp_path_factory.mktemp("torch") / "model"
            job(SCRIPTS[name]).main(
                [
                    *bases,
                    f"--train_data_dir={photos}",
                    f"--output_dir={folders[name]}",
                    *["--resolution=64", "--train_batch_size=1", "--max_train_steps=1", "--learning_rate=0"],
                    *["--save_format=diffusers", "--report_to=none"],
                ]
            )
        return str(folders[name])

    return convert


@pytest.mark.parametrize("page", [page for page in executable_pages() if snippets(page)])
def test_snippets_for_diffusers_run_on_what_the_page_has_made(page, models, for_diffusers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate_small_images(monkeypatch)
    generate_small_images(monkeypatch, diffusers)
    named = [name for name in SCRIPTS if any(name in code for code in snippets(page))]
    Reader(page, tmp_path, models, {name: for_diffusers(name) for name in named}).read()


def test_there_are_such_pages():
    assert sum(bool(snippets(page)) for page in executable_pages()) > 3
