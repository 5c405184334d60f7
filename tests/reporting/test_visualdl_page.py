"""VisualDL's pages of a finished run, as a browser shows them."""

import ppdiffusers_train  # noqa: F401

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.chromium import Chromium
from tests.conftest import scalars

PATIENCE = 30  # seconds; a page takes one or two where nothing else runs

# VisualDL draws its charts on canvases, titles and labels included: which text is drawn on which is kept.
KEEP_DRAWN_TEXTS = """
const drawn = window.drawnTexts = new Map(), draw = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...place) {
    drawn.set(this.canvas, (drawn.get(this.canvas) ?? new Set()).add(text));
    return draw.call(this, text, ...place);
};
"""
# {title: whether its axis reaches step 7}
CHARTS = "Object.fromEntries([...drawnTexts.values()].map(([title, ...labels]) => [title, labels.includes('7')]))"
# {tag: [width, height]}
PICTURES = """
Object.fromEntries([...document.querySelectorAll('article img')].map((image, index) =>
    [document.querySelectorAll('article h4')[index]?.innerText, [image.naturalWidth, image.naturalHeight]]))
"""
# {name: value}
TABLE = """
Object.fromEntries([...document.querySelectorAll('[role=table] .th')].map((name, index) =>
    [name.innerText, document.querySelectorAll('[role=table] .td')[index]?.innerText]))
"""


@pytest.fixture
def chromium(tmp_path):
    if not shutil.which("chromium"):
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse("no chromium on the PATH; on Debian: apt-get install chromium")
    with Chromium(tmp_path / "profile", (1240, 1000), KEEP_DRAWN_TEXTS, PATIENCE) as browser:
        yield browser


@contextlib.contextmanager
def visualdl(folder):
    """The address of the pages of `visualdl --logdir FOLDER`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = Path(sys.executable).with_name("visualdl")
    flags = ["--logdir", folder, "--host", "127.0.0.1", "--port", str(port), "--disable-telemetry"]
    server = subprocess.Popen([command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/alive") or server.poll() is not None)
        assert server.poll() is None, f"visualdl has ended with status {server.returncode}"
        yield f"http://127.0.0.1:{port}/app"
    finally:
        server.kill()
        server.wait()


def answers(url):
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE):
            return True
    except OSError:
        return False


def wait_for(happens):
    """Wait until it happens or patience ends; the caller checks whether it has."""
    deadline = time.monotonic() + PATIENCE
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.2)


def shown(chromium, expression, expected):
    """What an expression in the page is for each name in `expected`, once it is as expected or patience has ended."""

    def values():
        found = chromium.evaluate(expression)
        return {name: found.get(name) for name in expected}

    wait_for(lambda: values() == expected)
    return values()


@pytest.mark.once
def test_visualdl_shows_scalars_pictures_and_hyper_parameters_of_a_finished_run(train_decoder, chromium, tmp_path):
    out = train_decoder("--max_train_steps=7", "--validation_prompt=a cat", "--validation_inference_steps=1")
    figures = ("loss", "learning_rate", "gradient_norm", "samples_per_second")
    charts = {f"train/{name}": True for name in figures}
    pictures = {"validation": list(Image.open(out / "validation" / "step-7.png").size)}
    table = {
        "learning_rate": "0.001",
        "lr_scheduler": "constant",
        "train_batch_size": "2",
        "validation_prompts": "['a cat']",
        "train/loss": str(scalars(out)[-1]),
    }
    pages = {"scalar": (CHARTS, charts), "sample/image": (PICTURES, pictures), "hyper-parameter": (TABLE, table)}
    with visualdl(out / "logs") as url:
        for page, (expression, expected) in pages.items():
            chromium.open(f"{url}/{page}")
            assert shown(chromium, expression, expected) == expected
            screenshot = chromium.screenshot()
            screenshot.save(tmp_path / f"{page.replace('/', '-')}.png")
            assert len(screenshot.convert("RGB").getcolors(1 << 24)) > 50, f"{page} looks empty"
