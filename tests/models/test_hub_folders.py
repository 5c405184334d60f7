"""Models of the hub without the hub: those that any program has downloaded before are found in its cache."""

import ppdiffusers_train  # noqa: F401

import os
import shutil

import huggingface_hub
import pytest
from huggingface_hub.utils import reset_sessions

from tests.conftest import last_error, same, weights
from tests.fake_hub import FakeHub
from tests.reporting.test_hub import use_endpoint

pytestmark = pytest.mark.once  # no Paddle in it

NAME, COMMIT = "owner/tiny-sdxl", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub that cannot be reached, and the folder of its cache."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    yield folder
    reset_sessions()


def put_into_cache(source, cache, name=NAME, left_out=()):
    """What torch diffusers, or `huggingface-cli download`, leaves: files by their hash, and links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(path for path in source.rglob("*.*") if path.is_file())):
        link = snapshot / file.relative_to(source)
        if not {str(file.relative_to(source)), file.name} & set(left_out):
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blobs / str(number))
            link.symlink_to(os.path.relpath(blobs / str(number), link.parent))


def test_a_run_and_its_resume_take_a_cached_model(train_sdxl, sdxl, hub_cache, capsys):
    put_into_cache(sdxl, hub_cache)
    from_hub = f"--pretrained_model_name_or_path={NAME}"
    whole = train_sdxl("sdxl", from_hub, out="whole")
    assert f"--pretrained_model_name_or_path: {NAME!r} is taken from {hub_cache}" in capsys.readouterr().out
    assert same(weights(whole), weights(train_sdxl("sdxl", out="from_folder")))
    train_sdxl("sdxl", from_hub, "--max_train_steps=1", out="parts")
    resumed = train_sdxl("sdxl", from_hub, "--resume_from_checkpoint=latest", out="parts")
    assert "resumed from" in capsys.readouterr().out
    assert same(weights(resumed), weights(whole))


def test_a_vae_and_a_cache_of_one_s_own_are_found(train_sdxl, sdxl, hub_cache, tmp_path, capsys):
    """`--cache_dir` is looked into, and the hub's own cache as well."""
    put_into_cache(sdxl, tmp_path / "own")
    put_into_cache(sdxl / "vae", hub_cache, "owner/vae")
    flags = [f"--pretrained_model_name_or_path={NAME}", "--pretrained_vae_model_name_or_path=owner/vae"]
    out = train_sdxl("sdxl", *flags, f"--cache_dir={tmp_path / 'own'}", out="out")
    assert same(weights(out), weights(train_sdxl("sdxl", out="from_folder")))
    assert f"'owner/vae' is taken from {hub_cache}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "left_out, message",
    [
        (["unet/diffusion_paddle_model.safetensors"], "has no weights in unet/"),
        (["model_index.json"], "is not a pipeline|no pipeline"),
        (["tokenizer/vocab.json"], "tokenizer"),
    ],
)
def test_a_model_that_is_cached_in_part_is_refused(train_sdxl, sdxl, hub_cache, capsys, left_out, message):
    put_into_cache(sdxl, hub_cache, left_out=left_out)
    with pytest.raises(SystemExit) as stopped:
        train_sdxl("sdxl", f"--pretrained_model_name_or_path={NAME}")
    line = last_error(capsys)
    assert stopped.value.code == 2 and any(words in line for words in message.split("|"))
    assert "this copy in the hub's cache may be incomplete" in line


def test_a_model_that_is_nowhere_is_one_line(train_sdxl, hub_cache, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_sdxl("sdxl", f"--pretrained_model_name_or_path={NAME}")
    assert stopped.value.code == 2 and "nor is it in the cache; expected a pipeline's folder, or" in last_error(capsys)


def test_what_is_gone_from_the_hub_is_taken_from_the_cache_with_a_line(
    train_sdxl, sdxl, hub_cache, monkeypatch, capsys
):
    put_into_cache(sdxl, hub_cache)
    with FakeHub() as hub:
        use_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        reset_sessions()
        train_sdxl("sdxl", f"--pretrained_model_name_or_path={NAME}", "--max_train_steps=1")
    assert "the hub was not reached (404" in capsys.readouterr().out
