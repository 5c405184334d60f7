"""`make truesize` itself, without large models; tests/parity/test_true_size.py runs a case of tiny ones."""

import os
import signal
import sys

import pytest

from tests.conftest import ROOT, load_script

pytestmark = pytest.mark.once  # no Paddle in it

ALLOCATES = """
import os, sys, time
held = bytearray(200_000_000)
os.mkdir(sys.argv[1] + "/.checkpoint-1.tmp")
more = bytearray(100_000_000)
time.sleep(0.3)
os.rename(sys.argv[1] + "/.checkpoint-1.tmp", sys.argv[1] + "/checkpoint-1")
del more
print("Module: 5 trainable parameters, 2 samples", flush=True)
time.sleep(30 if sys.argv[2] == "waits" else 0.3)
"""


@pytest.fixture
def true_size(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load_script(ROOT / "benchmarks" / "true_size.py")


@pytest.mark.parametrize("ending", ["waits", "ends"])
def test_a_process_is_watched_from_outside(true_size, tmp_path, ending):
    command, kill_at = [sys.executable, "-c", ALLOCATES, tmp_path, ending], 1 if ending == "waits" else None
    run = true_size.Run(command, folder=tmp_path, kill_at=kill_at)
    figures = run.figures()
    assert figures["status"] == (-signal.SIGKILL if kill_at else 0)
    assert figures["own_peak"] == pytest.approx(310e6, rel=0.05) and figures["peak"] >= figures["own_peak"]
    assert 0.3 <= figures["checkpoint_seconds"] < 10
    assert figures["seconds"] < 20
    if not kill_at:
        assert figures["loaded"] < figures["seconds"] and figures["phases"]["train"] < 250e6


def test_an_estimate_is_read_as_it_is_printed(true_size):
    lines = ["", "memory per GPU", "  frozen weights      1.50 GB", "  EMA       2.00 MB   fits", "  (8.5 GB)"]
    assert true_size.read_estimate(lines) == {"frozen weights": 1.5e9, "EMA": 2e6}


def test_a_result_is_what_is_not_linked(true_size, tmp_path):
    base, result = tmp_path / "base", tmp_path / "result"
    for file, size in ((base / "vae", 500), (result / "unet" / "weights", 70), (result / "checkpoint-1" / "x", 900)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
    os.link(base / "vae", result / "vae")
    assert true_size.result_size(result) == 70 and true_size.size_of(result) == 1470


def test_the_page_says_what_is_missing_what_failed_and_what_is_off(true_size):
    run = {"own_peak": 12e9, "peak": 13e9, "phases": {"load": 9e9, "train": 12e9}, "seconds": 80.0, "loaded": 40.0}
    found = {
        "models": {"sdxl": {"parameters": {"unet": 2567463684}, "dtype": "float32", "bytes": 13.9e9}},
        "nothing": {"own_peak": 5e8},
        "dry run": {"seconds": 20.0},
        "estimate": {"peak": 9.5e9},
        "train": run,
    }
    text = true_size.page({"sdxl_lora": found, "sd3_lora": {**found, "failed": "Traceback"}})
    assert "| SDXL, LoRA | 9.50 GB | 0.50 GB | 10.00 GB | 12.00 GB | **+20%** | train | 13.00 GB |" in text
    assert "| SDXL, LoRA | train, killed | 9.00 GB | 12.00 GB | – | – |" in text
    assert "| SDXL, LoRA | 20 s | 40 s | – |" in text
    assert "| sdxl | unet 2,567,463,684 | float32 | 13.90 GB |" in text and text.count("2,567,463,684") == 1
    assert "**SD3 medium, LoRA, without T5** failed:\n\n```\nTraceback" in text
    assert "Not measured yet: Stable Diffusion 1.5" in text
