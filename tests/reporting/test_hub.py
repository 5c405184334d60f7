import ppdiffusers_train  # noqa: F401

import huggingface_hub
import pytest
from PIL import Image
from safetensors.numpy import load

from ppdiffusers_train.cli import main
from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.reporting.hub import check_hub_login, push_to_hub
from tests.conftest import last_error, weights
from tests.fake_hub import FakeHub

pytestmark = pytest.mark.once  # no tensor in what is uploaded and downloaded


def use_endpoint(monkeypatch, url):
    """What the environment variable HF_ENDPOINT does, which the library reads when it is imported."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch):
    with FakeHub() as hub:
        use_endpoint(monkeypatch, hub.url)
        yield hub


def test_a_run_uploads_its_result_and_nothing_else(hub, train_decoder):
    output_dir = train_decoder(
        "--push_to_hub", "--hub_token=hf_right", "--hub_model_id=my-decoder", "--checkpointing_steps=1",
        "--validation_prompt=a robot naruto", "--validation_inference_steps=1",
    )  # fmt: skip
    files = hub.files["owner/my-decoder"]
    assert {name.split("/")[0] for name in files} == {
        "README.md", "validation_grid.png", "model_index.json", "training_args.json", "unet", "movq", "scheduler",
        "prior_prior", "prior_image_encoder", "prior_text_encoder", "prior_tokenizer", "prior_scheduler",
        "prior_image_processor",
    }  # fmt: skip
    uploaded = load(files["unet/diffusion_paddle_model.safetensors"])
    assert all((uploaded[name] == array).all() for name, array in weights(output_dir).items())
    assert not [name for name, content in files.items() if b"hf_right" in content]


def test_the_card_says_what_the_model_is_made_of_and_shows_what_it_draws(hub, train_decoder, kandinsky):
    output_dir = train_decoder(
        "--push_to_hub", "--hub_token=hf_right", "--validation_prompt=a robot naruto", "--validation_inference_steps=1"
    )
    files = hub.files["owner/out"]
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.base_model == str(kandinsky[1]) and card.data.to_dict()["prior"] == [str(kandinsky[0])]
    assert card.data.library_name == "ppdiffusers" and "kandinsky" in card.data.tags
    assert "![validation](validation_grid.png)" in card.text and "* a robot naruto" in card.text
    assert files["validation_grid.png"] == (output_dir / "validation" / "step-2.png").read_bytes()


def test_a_wrong_token_leaves_the_result_and_says_so_in_one_line(hub, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(RunError, match="--push_to_hub: http://127.* refused .*; the result is in "):
        push_to_hub(tmp_path, "x", "hf_wrong", {}, None)
    assert (tmp_path / "model_index.json").exists() and hub.files == {}


def test_an_upload_without_a_token_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="--push_to_hub: no token; expected the environment variable HF_TOKEN"):
        check_hub_login(None)
    check_hub_login("hf_given")


@pytest.mark.parametrize("name", ["a b", "a/b/c", "my-decoder.git", "-x", "a" * 97, "a--b", "a/"])
def test_a_name_that_cannot_be_is_found_out_before_training(hub, train_decoder, capsys, tmp_path, name):
    with pytest.raises(SystemExit) as stopped:
        train_decoder("--push_to_hub", "--hub_token=hf_right", f"--hub_model_id={name}")
    assert stopped.value.code == 2 and "error: --hub_model_id: no repository can have" in last_error(capsys)
    assert not list((tmp_path / "out").iterdir()) and not hub.requests


def test_so_is_a_token_that_may_not_write_and_a_folder_whose_name_cannot_be(hub, train_decoder, capsys, tmp_path):
    for flags, out, message in (
        (["--hub_token=hf_wrong"], "out", f"error: --push_to_hub: {hub.url} refused (401"),
        (["--hub_token=hf_right"], "my run", "error: --output_dir, the name of the repository without --hub_model_id"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_decoder("--push_to_hub", *flags, out=out)
        message_found = last_error(capsys)
        assert stopped.value.code == 2 and message in message_found, message_found
        assert not list((tmp_path / out).iterdir())


def test_a_result_can_be_uploaded_later_with_the_same_card(hub, train_decoder, capsys, tmp_path, monkeypatch):
    flags = ["--hub_token=hf_right", "--validation_prompt=a robot naruto", "--validation_inference_steps=1"]
    at_once = train_decoder("--push_to_hub", "--hub_model_id=my-decoder", *flags)
    expected = hub.files.pop("owner/my-decoder")
    later = train_decoder(*flags, out="later")
    assert not hub.files and not (later / "README.md").exists()
    main(["push", str(later), "--hub_model_id=my-decoder", "--hub_token=hf_right"])
    assert capsys.readouterr().out.splitlines()[-1] == f"uploaded to {hub.url}/owner/my-decoder"
    files = hub.files["owner/my-decoder"]
    own = {"training_args.json"}  # its command and its id
    assert files.keys() == expected.keys() and all(files[name] == expected[name] for name in files.keys() - own)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    (tmp_path / "empty").mkdir()
    (at_once / "unet" / "config.json").write_text("{}")
    cases = {
        (str(tmp_path / "empty"),): "has no result of a training script: it has no result.json",
        (str(at_once),): "has no complete result: unet/config.json is missing, or does not have",
        (str(later), "--hub_model_id=a b"): "--hub_model_id: no repository can have this name (Repo id must use",
        (str(later),): "no token; expected the environment variable HF_TOKEN",
    }
    for words, message in cases.items():
        with pytest.raises(SystemExit) as stopped:
            main(["push", *words])
        assert stopped.value.code == 2 and message in last_error(capsys)


def test_a_hub_name_downloads_the_parts_that_are_needed(hub, tmp_path):
    hub.files["owner/tiny"] = {
        "model_index.json": b"{}",
        "unet/config.json": b'{"width": 7}',
        "unet/diffusion_pytorch_model.safetensors": b"s",
        "unet/diffusion_pytorch_model.bin": b"b",
        "vae/config.json": b"{}",
    }
    folder = PipelineFolder("owner/tiny", "--pretrained_x", ["unet"], cache_dir=tmp_path)
    assert folder.config("unet") == {"width": 7} and folder.is_torch("unet")
    assert sorted(path.name for path in folder.path.iterdir()) == ["model_index.json", "unet"]
    assert sorted(path.name for path in folder.folders["unet"].iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_dry_run_downloads_no_weights(hub, tmp_path):
    hub.files["owner/tiny"] = {
        "model_index.json": b"{}",
        "unet/config.json": b'{"width": 7}',
        "unet/diffusion_pytorch_model.safetensors": b"s",
    }
    folder = PipelineFolder("owner/tiny", "--pretrained_x", ["unet"], cache_dir=tmp_path, weights=False)
    assert folder.config("unet") == {"width": 7}
    assert [path.name for path in folder.folders["unet"].iterdir()] == ["config.json"]


def test_a_teacher_is_downloaded_at_its_revision(hub, sd, lcm_jobs, photos, tmp_path):
    hub.files["owner/sd"] = {str(file.relative_to(sd)): file.read_bytes() for file in sd.rglob("*") if file.is_file()}
    flags = ["--pretrained_teacher_model=owner/sd", "--teacher_revision=v2", f"--cache_dir={tmp_path / 'hub'}"]
    flags += [
        f"--train_data_dir={photos}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=64",
        "--max_train_steps=1",
    ]
    lcm_jobs["lora_sd"].main([*flags, "--train_batch_size=1"])
    asked = {path for _, path in hub.requests if path.startswith("/api/")}
    assert asked and all("/v2" in path for path in asked), "the commit of that revision is what is downloaded then"


def test_a_name_that_the_hub_does_not_know_gets_one_line(hub, tmp_path):
    with pytest.raises(UserError, match="--pretrained_x: 'owner/nothing' is not a folder here and cannot be"):
        PipelineFolder("owner/nothing", "--pretrained_x", ["unet"], cache_dir=tmp_path)


def test_a_hub_that_cannot_be_reached_gets_one_line(monkeypatch, tmp_path):
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="set HF_ENDPOINT to a mirror that can be reached"):
        PipelineFolder("owner/tiny", "--pretrained_x", ["unet"], cache_dir=tmp_path)


def test_the_grid_of_the_last_validation_is_the_newest_by_number(hub, tmp_path):
    (tmp_path / "validation").mkdir()
    for step, colour in ((9, "red"), (10, "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / "validation" / f"step-{step}.png")
    push_to_hub(tmp_path, "x", "hf_right", {}, ["a"])
    newest = (tmp_path / "validation" / "step-10.png").read_bytes()
    assert hub.files["owner/x"]["validation_grid.png"] == newest
