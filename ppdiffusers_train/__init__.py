"""Fine-tuning and distillation of text-to-image diffusion models on PaddlePaddle, on top of ppdiffusers.

Import this package before `paddle`: it prepares the processor's threads and libraries, which Paddle reads only once,
while it is being imported. Nothing that is already set in the environment is touched, and nothing is printed.
"""

from ppdiffusers_train.runtime.cpu import prepare_cpu

prepare_cpu()

__version__ = "0.1.0"
