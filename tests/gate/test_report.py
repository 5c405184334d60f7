import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
from PIL import Image

from ppdiffusers_train.toy.demo.demo import PROMPTS, plot_figure
from tests.conftest import ROOT
from tests.gate.report import main, verdict
from tests.gate.wall import before_and_after, places


def test_two_runs_differ_where_chance_does_not_explain_it():
    # 2 √((0.6 · 0.4 + 0.4 · 0.6) / 67) = 0.169, and 2 √((0.5 · 0.5 + 0.4 · 0.6) / 67) = 0.171
    assert verdict(0.6, 0.4, 67) == "an effect is seen: 20.0 points, where chance alone explains up to 16.9."
    assert verdict(0.4, 0.5, 67) == "no effect is seen: 10.0 points, where chance alone explains up to 17.1."


def test_the_page_is_what_its_figures_say_and_what_is_not_measured_again_stays(tmp_path):
    docs, source = tmp_path / "docs", tmp_path / "gate"
    source.mkdir()
    shutil.copytree(ROOT / "docs/results", docs / "results")
    figures = (ROOT / "docs/results.json").read_text(encoding="utf-8")
    (docs / "results.json").write_text(figures, encoding="utf-8")
    main(source, docs)
    page = (docs / "results.md").read_text(encoding="utf-8")
    assert page == (ROOT / "docs/results.md").read_text(encoding="utf-8")

    decoder = json.loads(figures)["decoder"]
    decoder["after"]["outlined"] = 0.125
    (source / "decoder.json").write_text(json.dumps(decoder), encoding="utf-8")
    main(source, docs)
    changed = (docs / "results.md").read_text(encoding="utf-8")
    (line,) = (line for line in changed.splitlines() if line not in page.splitlines())
    assert line.startswith("| decoder, after |") and line.endswith("| 12.5 % |")
    assert json.loads((docs / "results.json").read_text(encoding="utf-8"))["prior"] == json.loads(figures)["prior"]
    with Image.open(docs / "wall.png") as new, Image.open(ROOT / "docs/wall.png") as kept:
        assert np.array_equal(new, kept), "docs/wall.png shows the images of docs/results"


def test_the_wall_shows_the_images_of_a_figure_and_nothing_around_them(tmp_path):
    before, after = ([np.full((32, 32, 3), shade + 9 * i, np.uint8) for i in range(len(PROMPTS))] for shade in (9, 130))
    plot_figure(before, {"before": before, "after": after}, [500.0, 0.1, 3.0]).savefig(tmp_path / "job.png", dpi=100)
    wall = np.asarray(before_and_after(tmp_path / "job.png", places()))
    assert set(np.unique(wall)) == {*(9 + 18 * i for i in range(5)), *(130 + 18 * i for i in range(5)), 255}
