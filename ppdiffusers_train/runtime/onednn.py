"""Convolutions by oneDNN's kernels, forward and backward, in Paddle's dynamic graph. For processors, and Paddle 3.

Paddle brings oneDNN along, but its dynamic graph always takes Paddle's own kernels, which lay out an image's patches
with one thread, and multiply image by image. A static program takes oneDNN's where a pass of Paddle has put them, and
programs can be run from the dynamic graph: that is how `paddle.jit.to_static` works. So each shape of convolution
becomes a program of one operation, and one of its gradient.
"""

import math
import warnings
from functools import cache

import paddle
from paddle.base.libpaddle import pir

from ppdiffusers_train.runtime.cpu import configured_threads

# Below these, putting numbers in oneDNN's order takes longer than what its kernels gain, and a program is not worth the
# 30 ms that it takes to build: places in the output over all images, and operations forward.
LEAST_PLACES, LEAST_OPERATIONS = 256, 5e7
PROGRAMS = {}


def pays(x, weight, stride) -> bool:
    """Whether a convolution of `[B, C, H, W]` by `[N, C / groups, h, w]` is one that oneDNN makes faster."""
    if x.dtype != paddle.float32 or math.prod(weight.shape[2:]) == 1 or not x.is_contiguous():
        return False
    steps = math.prod(stride) if isinstance(stride, (list, tuple)) else stride**2
    places = x.shape[0] * x.shape[2] * x.shape[3] // steps
    return places >= LEAST_PLACES and 2 * places * weight.size >= LEAST_OPERATIONS


def convolve(function, x, weight, *options):
    """`function(x, weight, None, *options)`, one of Paddle's for convolutions: the same up to rounding."""
    key = (function, *x.shape, *weight.shape, weight.stop_gradient, str(options))
    if key not in PROGRAMS:
        PROGRAMS[key] = build(function, x, weight, options)
    y = PROGRAMS[key]([x, weight])
    if not paddle.is_grad_enabled() or (x.stop_gradient and weight.stop_gradient):
        y.stop_gradient = True  # it has the program's, which knows of gradients
    return y


def build(function, x, weight, options):
    """The program of a convolution of tensors like these, to be called with a list of the two.

    It has a gradient, for `x` in any case: oneDNN keeps buffers for each program, and a LoRA's teacher shares these.
    """
    register_operations()
    x = x.detach()
    x.stop_gradient = False

    def convolution(x, weight):
        return function(x, weight, None, *options)

    with paddle.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Tensor do not have 'place'")  # Paddle's own code asks for it
        program = paddle.jit.to_static(convolution, full_graph=True).get_concrete_program(x, weight)[1]
        parts = program.train_program.forward_program, program.train_program.backward_program
    for part in parts:
        passes = pir.PassManager()
        passes.add_pass("onednn_placement_pass", {})
        passes.run(part)
        for operation in part.global_block().ops:
            if operation.name().startswith("onednn_op."):
                operation.set_bool_attr("is_test", False)  # the pass is made for inference; the gradient refuses it
    return program


@cache
def register_operations() -> None:
    """Run a first static program: with it Paddle comes to know oneDNN's operations, which the pass puts in place."""
    paddle.base.core.set_num_threads(configured_threads())  # oneDNN's are OpenMP's, of which Paddle takes one
    paddle.set_flags({"FLAGS_new_executor_serial_run": True})  # else each program keeps twice as many threads

    def same(x):
        return x + 0

    paddle.jit.to_static(same, full_graph=True)(paddle.zeros([1]))
