"""Convolutions with oneDNN's kernels, forward and backward, in Paddle's dynamic graph. For CPUs and Paddle 3.

Paddle includes oneDNN, but its dynamic graph always uses Paddle's own kernels, which unfold an image's patches with one
thread and multiply image by image. A static program uses oneDNN's kernels where a pass of Paddle has put them, and can
be run from the dynamic graph, as `paddle.jit.to_static` does. So each shape of convolution becomes a program of one
operation, and its gradients another program.

oneDNN keeps buffers, about as large as inputs and outputs, for each unfinished program. As separate programs, forward
and backward are finished when they return, and all convolutions of a shape share the buffers. In one program with a
gradient, as `to_static` builds it, each layer would have its own.
"""

import math
import warnings
from functools import cache

import paddle
from paddle.autograd import PyLayer
from paddle.base.libpaddle import pir

from ppdiffusers_train.cpu.environment import configured_threads

# Below these, converting tensors to oneDNN's layout takes longer than its kernels save, and a program is not worth the
# 30 ms that it takes to build: output positions over all images, and operations of the forward pass.
LEAST_PLACES, LEAST_OPERATIONS = 256, 5e7
PROGRAMS = {}


def pays(x, weight, stride) -> bool:
    """Whether a convolution of `[B, C, H, W]` by `[N, C / groups, h, w]` is faster with oneDNN."""
    if x.dtype != paddle.float32 or math.prod(weight.shape[2:]) == 1 or not x.is_contiguous():
        return False
    steps = math.prod(stride) if isinstance(stride, (list, tuple)) else stride**2
    places = x.shape[0] * x.shape[2] * x.shape[3] // steps
    return places >= LEAST_PLACES and 2 * places * weight.size >= LEAST_OPERATIONS


class Convolution(PyLayer):
    """`function(x, weight, None, *options)`, one of Paddle's functions for convolutions; the same up to rounding."""

    @staticmethod
    def forward(ctx, x, weight, function, *options):
        ctx.save_for_backward(x, weight)
        ctx.function, ctx.options = function, options
        ctx.frozen = x.stop_gradient, weight.stop_gradient  # tensors that recomputation has saved no longer have it

        def convolution(x, weight):
            return function(x, weight, None, *options)

        return run(convolution, (function, str(options)), x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        function, options, frozen = ctx.function, ctx.options, ctx.frozen

        def gradients(x, weight, gradient):
            x.stop_gradient, weight.stop_gradient = frozen
            trained = [tensor for tensor in (x, weight) if not tensor.stop_gradient]
            return paddle.static.gradients([function(x, weight, None, *options)], trained, [gradient])

        found = iter(paddle.utils.flatten(run(gradients, (function, str(options), frozen), x, weight, gradient)))
        return tuple(None if stop else next(found) for stop in frozen)


def run(function, name: tuple, *tensors):
    """Run `function(*tensors)` as a program; there is one for each name and shapes."""
    key = (name, *(tuple(tensor.shape) for tensor in tensors))
    if key not in PROGRAMS:
        PROGRAMS[key] = build(function, tensors)
    return PROGRAMS[key](tensors)


def build(function, tensors):
    """The program of a function of tensors like these, with oneDNN's operations; it is called with a list of them."""
    register_operations()
    with paddle.enable_grad(), warnings.catch_warnings():  # the function may compute gradients
        warnings.filterwarnings("ignore", message="Tensor do not have 'place'")  # caused by Paddle's own code
        tensors = [tensor.detach() for tensor in tensors]
        program = paddle.jit.to_static(function, full_graph=True).get_concrete_program(*tensors)[1]
    graph = program.program.forward_program
    passes = pir.PassManager()
    passes.add_pass("dead_code_elimination_pass", {})  # a convolution of which only the gradients are needed
    passes.add_pass("onednn_placement_pass", {})
    passes.run(graph)
    for operation in graph.global_block().ops:
        if operation.name().startswith("onednn_op."):
            operation.set_bool_attr("is_test", False)  # else it keeps the weights of the first call
    return program


@cache
def register_operations() -> None:
    """Run a first static program, which makes Paddle register oneDNN's operations for the pass."""
    paddle.base.core.set_num_threads(configured_threads())  # oneDNN uses OpenMP's threads, of which Paddle sets 1
    paddle.set_flags({"FLAGS_new_executor_serial_run": True})  # else each program keeps twice as many threads

    def same(x):
        return x + 0

    paddle.jit.to_static(same, full_graph=True)(paddle.zeros([1]))
