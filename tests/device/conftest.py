"""Fixtures: the device in software, and processes that compute on it."""

import ppdiffusers_train  # noqa: F401

import json
import subprocess
import sys

import paddle  # noqa: F401
import pytest

from tests.conftest import ROOT
from tests.device.build import CannotBuild, build
from tests.device.jobs import Jobs
from tests.distributed.launching import environment, launch_command

# The low types of the device: `paddle.amp` of Paddle 2.6 refuses bfloat16 on all plugins.
LOW = ["float16"]
if hasattr(sys.modules["paddle.amp.auto_cast"], "_is_custom_device_bfloat16_supported"):
    LOW.append("bfloat16")


@pytest.fixture(scope="session")
def device():
    """The folder that `CUSTOM_DEVICE_ROOT` has to name for a process to have the device."""
    try:
        return build()
    except CannotBuild as reason:
        pytest.skip(f"no device in software: {reason}")


@pytest.fixture(scope="session")
def on_device(device, tmp_path_factory):
    """`on_device(jobs, ranks=1)` runs jobs of `runner.py` in a process, or one per rank, and returns their reports."""

    def run(jobs, ranks=1, timeout=1800):
        folder = tmp_path_factory.mktemp("on_device")
        (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
        arguments = ["-m", "tests.device.runner", folder / "jobs.json", folder / "report.json"]
        if ranks == 1:
            command = [sys.executable, *arguments]
        else:
            form = ("--devices", ",".join(map(str, range(ranks))))
            runner = ROOT / "tests" / "device" / "runner.py"
            command = launch_command(runner, *arguments[2:], form=form, log_dir=folder / "log")
        more = {"CUSTOM_DEVICE_ROOT": str(device), "PADDLE_XCCL_BACKEND": "soft_device", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout
        )
        everything = done.stdout + done.stderr + "".join(path.read_text() for path in folder.glob("log/workerlog.*"))
        assert done.returncode == 0, everything[-5000:]
        return json.loads((folder / "report.json").read_text())

    return run


@pytest.fixture
def jobs(kandinsky, sdxl, sd3, sd, qwen, photos, tmp_path):
    """An empty list of jobs on tiny models."""
    return Jobs({"kandinsky": kandinsky, "sdxl": sdxl, "sd3": sd3, "sd": sd, "qwen": qwen}, photos, tmp_path)
