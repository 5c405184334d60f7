import ppdiffusers_train  # noqa: F401

import importlib.util
import io

import numpy as np
import pytest
from PIL import Image

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.reporting.trackers import open_trackers, tracker_names

pytestmark = pytest.mark.once  # no Paddle in it


def report(directory, name):
    with open_trackers(name, directory, "project", {"learning_rate": 1e-3, "prompts": ["a"]}) as trackers:
        for step in (1, 2):
            trackers.scalars({"train/loss": 0.5 * step}, step)
        trackers.image("validation", Image.new("RGB", (3, 2), "red"), 2)


def test_visualdl_holds_scalars_and_pictures(tmp_path):
    from visualdl import LogReader

    report(tmp_path, "visualdl")
    (file,) = (tmp_path / "visualdl" / "start-1").iterdir()
    reader = LogReader(file_path=str(file))
    assert [(record.id, record.value) for record in reader.get_data("scalar", "train/loss")] == [(1, 0.5), (2, 1.0)]
    picture = reader.get_data("image", "validation")[0].image.encoded_image_string
    assert np.array(Image.open(io.BytesIO(picture))).tolist() == [[[255, 0, 0]] * 3] * 2
    assert b"learning_rate" in file.read_bytes()


def test_visualdl_shows_all_starts_of_a_run(tmp_path):
    from visualdl import LogReader
    from visualdl.server.lib import get_hparam_list, get_scalar

    for _ in range(2):
        report(tmp_path, "visualdl")
    shown = LogReader(str(tmp_path))
    assert sorted(shown.runs()) == [str(tmp_path / "visualdl" / f"start-{number}") for number in (1, 2)]
    for run in shown.runs():
        assert [(step, value) for _, step, value in get_scalar(shown, run, "train/loss")] == [(1, 0.5), (2, 1.0)]
    assert [trial["hparams"]["learning_rate"] for trial in get_hparam_list(shown)] == [1e-3] * 2


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    report(tmp_path, "tensorboard")
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").rglob("events*"))
    assert content.count(b"train/loss") == 2 and b"validation" in content and b"learning_rate" in content


def test_none_reports_nowhere_and_all_to_what_is_installed(tmp_path):
    report(tmp_path / "nothing", "none")
    assert not (tmp_path / "nothing").exists()
    assert "visualdl" in tracker_names("all")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused_with_what_installs_it():
    with pytest.raises(UserError, match="--report_to wandb: not installed; expected `pip install wandb` first"):
        open_trackers("wandb", None, "project", {})
