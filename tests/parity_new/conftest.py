"""Runs the torch side, and gives tests its files and numbers."""

import os
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import ROOT

TORCH = os.environ.get("PARITY_NEW_PYTHON", str(ROOT / ".venv-parity-new/bin/python"))


def run_torch(job, folder):
    """A job of `torch_side`, in its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [TORCH, "-m", "tests.parity_new.torch_side", job, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The folder that the torch side has written, see `torch_side.write`."""
    folder = tmp_path_factory.mktemp("qwen")
    run_torch("write", folder)
    return folder


@pytest.fixture(scope="session")
def expected(reference):
    """{name: array} of all that torch has computed."""
    return load_file(reference / "expected.safetensors")


def assert_close(found, expected, tolerance=1e-5):
    """The largest difference is at most `tolerance`, relative to the largest value where that is above 1."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    worst = np.abs(found - expected).max() / max(1, np.abs(expected).max())
    assert worst <= tolerance, worst
