"""Convolutions by oneDNN's kernels, forward and backward, in Paddle's dynamic graph. For processors, and Paddle 3.

Paddle brings oneDNN along, but its dynamic graph always takes Paddle's own kernels, which lay out an image's patches
with one thread, and multiply image by image. A static program takes oneDNN's where a pass of Paddle has put them, and
programs can be run from the dynamic graph: that is how `paddle.jit.to_static` works. So each shape of convolution
becomes a program of one operation, and another of its gradients.

oneDNN keeps its buffers, about as large as what goes in and comes out, for each program that is under way at one time.
As one program each the two are over when they return, and all convolutions of a shape share the buffers. As one
program with a gradient, which `to_static` would make of them, each layer has its own.
"""

import math
import warnings
from functools import cache

import paddle
from paddle.autograd import PyLayer
from paddle.base.libpaddle import pir

from ppdiffusers_train.cpu.environment import configured_threads

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


class Convolution(PyLayer):
    """`function(x, weight, None, *options)`, one of Paddle's for convolutions: the same up to rounding."""

    @staticmethod
    def forward(ctx, x, weight, function, *options):
        ctx.save_for_backward(x, weight)
        ctx.function, ctx.options = function, options
        ctx.frozen = x.stop_gradient, weight.stop_gradient  # what recomputation saves no longer knows

        def convolution(x, weight):
            return function(x, weight, None, *options)

        return run(convolution, (function, str(options)), x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        function, options, frozen = ctx.function, ctx.options, ctx.frozen

        def gradients(x, weight, gradient):
            x.stop_gradient, weight.stop_gradient = frozen
            learning = [tensor for tensor in (x, weight) if not tensor.stop_gradient]
            return paddle.static.gradients([function(x, weight, None, *options)], learning, [gradient])

        found = iter(paddle.utils.flatten(run(gradients, (function, str(options), frozen), x, weight, gradient)))
        return tuple(None if stop else next(found) for stop in frozen)


def run(function, name: tuple, *tensors):
    """`function(*tensors)` as a program, of which there is one for each name and shapes."""
    key = (name, *(tuple(tensor.shape) for tensor in tensors))
    if key not in PROGRAMS:
        PROGRAMS[key] = build(function, tensors)
    return PROGRAMS[key](tensors)


def build(function, tensors):
    """The program of a function of tensors like these, with oneDNN's operations; to be called with a list of them."""
    register_operations()
    with paddle.enable_grad(), warnings.catch_warnings():  # for the gradients that it may be about
        warnings.filterwarnings("ignore", message="Tensor do not have 'place'")  # Paddle's own code asks for it
        tensors = [tensor.detach() for tensor in tensors]
        program = paddle.jit.to_static(function, full_graph=True).get_concrete_program(*tensors)[1]
    graph = program.program.forward_program
    passes = pir.PassManager()
    passes.add_pass("dead_code_elimination_pass", {})  # a convolution whose gradients alone are asked for
    passes.add_pass("onednn_placement_pass", {})
    passes.run(graph)
    for operation in graph.global_block().ops:
        if operation.name().startswith("onednn_op."):
            operation.set_bool_attr("is_test", False)  # else it takes the weights of the first call for those of all
    return program


@cache
def register_operations() -> None:
    """Run a first static program: with it Paddle comes to know oneDNN's operations, which the pass puts in place."""
    paddle.base.core.set_num_threads(configured_threads())  # oneDNN's are OpenMP's, of which Paddle takes one
    paddle.set_flags({"FLAGS_new_executor_serial_run": True})  # else each program keeps twice as many threads

    def same(x):
        return x + 0

    paddle.jit.to_static(same, full_graph=True)(paddle.zeros([1]))
