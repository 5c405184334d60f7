"""Fine-tuning and distillation of text-to-image diffusion models on PaddlePaddle, on top of ppdiffusers.

Import this package before `paddle`: it sets the CPU's threads and libraries, which Paddle reads only once, when it is
imported. It changes no environment variable that is already set, and prints nothing. In a process that Paddle's
launcher has started, it first masks secrets in the launcher's log files, and then continues in a child process
(`launcher/supervisor.py`).
"""

import importlib

from ppdiffusers_train.cpu.environment import prepare_cpu
from ppdiffusers_train.launcher.supervisor import continue_under_supervisor
from ppdiffusers_train.launcher.tokens import mask_launcher_logs, receive_secrets

mask_launcher_logs()
receive_secrets()
continue_under_supervisor()
prepare_cpu()

__version__ = "0.2.0"
PIPELINES = {"QwenImagePipeline": "ppdiffusers_train.models.qwen_image.pipeline"}


def __getattr__(name):
    """The pipelines, imported when they are asked for."""
    if name in PIPELINES:
        return getattr(importlib.import_module(PIPELINES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
