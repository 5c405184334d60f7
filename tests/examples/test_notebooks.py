"""The quickstart notebooks: the same cells of code in both languages, and they run from top to bottom."""

import ppdiffusers_train  # noqa: F401
from ppdiffusers_train import cli

import base64
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

pytestmark = pytest.mark.once  # what it runs has tests of its own

NAMES = ("quickstart", "quickstart_zh")
STEPS = "--max_train_steps 300"


def cells(name):
    return json.loads((ROOT / "examples" / f"{name}.ipynb").read_text("utf-8"))["cells"]


def test_both_languages_have_the_same_cells_of_code_and_nothing_stored():
    english, chinese = map(cells, NAMES)
    assert [cell["cell_type"] for cell in english] == [cell["cell_type"] for cell in chinese]
    for one, other in zip(english, chinese):
        if one["cell_type"] == "code":
            assert one == other and one["outputs"] == [] and one["execution_count"] is None
        else:
            assert one["source"] != other["source"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    cli.main(["examples", str(tmp_path / "mine")])
    notebook = nbformat.read(tmp_path / "mine" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    training = next(cell for cell in notebook.cells if STEPS in cell.source)
    training.source = training.source.replace(STEPS, "--max_train_steps 12")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "mine")}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "wrote the result to quickstart/lora" in said and "for diffusers" in said
    images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    training_images, before, after = (np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in images)
    assert all(len(np.unique(sheet)) > 100 for sheet in (training_images, before, after))
    assert os.listdir(tmp_path / "mine" / "quickstart" / "lora-diffusers") == ["pytorch_lora_weights.safetensors"]
