"""Runs jobs on the device in software, one after another in one process, for tests that look at what they left.

    CUSTOM_DEVICE_ROOT=$(python -m tests.device.build) python -m tests.device.runner jobs.json report.json

A job is `{"script": a training script, "flags": [...]}` or `{"call": "module:function", "arguments": {...}}`; the
report has a dictionary for each, see `run_job`. Under Paddle's launcher every rank runs all jobs, and rank 0 reports.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import paddle
from paddle.base import core

from tests.conftest import load_script
from tests.device.build import LIBRARY


def main(jobs_file, report_file):
    allow_bfloat16()
    use_device()
    library = ctypes.CDLL(str(Path(os.environ["CUSTOM_DEVICE_ROOT"]) / LIBRARY))
    calls_file = f"{report_file}.calls-{rank()}"
    reports = []
    for job in json.loads(Path(jobs_file).read_text()):
        report = run_job(job)
        library.soft_device_write_calls(calls_file.encode())
        report["calls"] = read_calls(calls_file)
        reports.append(report)
        gc.collect()
    if rank() == 0:
        Path(report_file).write_text(json.dumps(reports))


def allow_bfloat16():
    """Paddle answers for four devices that it knows by name only, and for others that they cannot compute in it. Paddle
    2.6 does not ask: there, plugins have float16 alone."""
    sys.modules["paddle.amp.auto_cast"]._is_custom_device_bfloat16_supported = lambda: True


def use_device():
    """Compute on the device; ranks are given theirs by the launcher."""
    (name,) = core.get_all_custom_device_type()
    if "PADDLE_TRAINERS_NUM" not in os.environ:
        paddle.set_device(name)


def rank() -> int:
    """This process among those of a launch."""
    return int(os.environ.get("PADDLE_TRAINER_ID", 0))


def run_job(job) -> dict:
    """What a job did: `status` (0, or that with which its process would have ended), `said`, `warnings`, `error` (a
    traceback), `result` (of a call) and `seconds`."""
    report = {"status": 0, "error": "", "result": None}
    said, start = io.StringIO(), time.monotonic()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(record=True) as met,
    ):
        warnings.simplefilter("always")
        try:
            report["result"] = run_call(job) if "call" in job else run_script(job)
        except SystemExit as end:
            report["status"] = end.code
        except Exception:
            report["status"], report["error"] = 1, traceback.format_exc()
    report["said"], report["seconds"] = said.getvalue(), time.monotonic() - start
    report["warnings"] = sorted({str(warning.message) for warning in met})
    return report


def run_script(job):
    path = Path(job["script"])
    sys.argv = [str(path), *job["flags"]]
    load_script(path).main(job["flags"])


def run_call(job):
    module, function = job["call"].split(":")
    return getattr(importlib.import_module(module), function)(**job.get("arguments", {}))


def read_calls(file) -> dict:
    """{"matmul float16 rounded": how often that kernel ran}."""
    lines = [line.rsplit(" ", 1) for line in Path(file).read_text().splitlines()]
    return {kernel: int(count) for kernel, count in lines}


if __name__ == "__main__":
    main(*sys.argv[1:])
