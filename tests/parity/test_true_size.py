"""A case of `make truesize` with tiny models: every command of it runs, is killed, goes on, and its result loads."""

import sys

import pytest

from tests.conftest import ROOT, load_script


@pytest.fixture
def true_size(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script(ROOT / "benchmarks" / "true_size.py")


def test_a_case_runs_from_its_models_to_the_loaded_result(true_size, tmp_path):
    case, folders = true_size.CASES["decoder_full"], (tmp_path / "models", tmp_path / "run")
    found = true_size.measure(case, *folders, true_size.PARTS, sys.executable, is_tiny=True)
    assert "failed" not in found, found["failed"]
    assert found["models"]["kandinsky2_2_decoder"]["parameters"]["unet"] == 10_978_856
    assert found["estimate"]["peak"] > 40e6
    assert found["train"]["checkpoint_seconds"] > 0 and found["resume"]["result_seconds"] > 0
    # The UNet in float32, in the checkpoint with moments in 8 bits. Of a result in the base's layout, only it is new.
    assert 43.9e6 < found["result_bytes diffusers"] < 50e6 < found["checkpoint_bytes"] < 80e6
    assert found["result_bytes ppdiffusers"] > 90e6
