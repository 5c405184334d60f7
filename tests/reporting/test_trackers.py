import ppdiffusers_train  # noqa: F401

import importlib.util
import io
import re

import numpy as np
import pytest
from PIL import Image

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.reporting.trackers import clean_tag, open_trackers, read_scalars, tracker_names
from tests.conftest import no_file_above

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


@pytest.mark.parametrize("name", ["visualdl", "tensorboard"])
def test_a_full_disk_ends_a_tracker_with_one_line_and_nothing_else(tmp_path, name, capsys):
    """Left alone, VisualDL damages its file, and tensorboardX's thread ends: the eleventh figure waits forever."""
    with open_trackers(name, tmp_path, "project", {"seed": 1}) as trackers:
        trackers.scalars({"train/loss": 1.5}, 1)
        with no_file_above(2000):
            for step in range(2, 200):
                trackers.scalars({"train/loss": 0.5 * step}, step)
            trackers.image("validation", Image.new("RGB", (3, 2), "red"), 2)
            trackers.__exit__()
        trackers.scalars({"train/loss": 1.0}, 200)
    said = capsys.readouterr()
    line = f"--report_to {name}: figures cannot be written to {str(tmp_path)!r}: File too large ("
    assert said.out.startswith(line) and said.out.endswith("continuing without them\n") and said.out.count("\n") == 1
    assert "Traceback" not in said.err
    if name == "visualdl":
        assert read_scalars(tmp_path, "train/loss")[:5] == [1.5, 1.0, 1.5, 2.0, 2.5]


def test_tags_of_any_names_are_taken_and_stay_apart(tmp_path):
    names = [
        "100%.jpg",
        "100 .jpg",
        "100_.jpg",
        "a\nb",
        "a\tb",
        "猫/图 1.png",
        "👍.png",
        "👎.png",
        "\udcff",
        "%",
        "e\u0301",
        "é",
    ]
    with open_trackers("all", tmp_path, "project", {"folder": "\udcff%"}) as trackers:
        trackers.scalars({f"loss_for/{name}": 1.0 for name in names}, 1)
        trackers.image("100%", Image.new("RGB", (3, 2), "red"), 2)
        assert trackers.opened, "nothing was dropped"
    tags = [clean_tag(f"loss_for/{name}") for name in names]
    assert len(set(tags)) == len(names) and all(re.fullmatch(r"[-/.\w]+", tag) for tag in tags)
    assert clean_tag("train/loss") == "train/loss" and "猫/图_1.png-" in clean_tag("猫/图 1.png")
    assert all(read_scalars(tmp_path, tag) == [1.0] for tag in tags)
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").rglob("events*"))
    assert all(tag.encode() in content for tag in tags)


def test_none_reports_nowhere_and_all_to_what_is_installed(tmp_path):
    report(tmp_path / "nothing", "none")
    assert not (tmp_path / "nothing").exists()
    assert "visualdl" in tracker_names("all")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused_with_what_installs_it():
    with pytest.raises(UserError, match="--report_to wandb: not installed; expected `pip install wandb` first"):
        open_trackers("wandb", None, "project", {})
