"""Operators that our jobs and the models in them are made of, with small inputs, for tests of their gradients."""

import ppdiffusers_train  # noqa: F401

import zlib
from itertools import chain, combinations

import numpy as np
import paddle
from paddle.nn import functional

from ppdiffusers_train.models.attention import provide_joint_attention

provide_joint_attention()
IDS = [[3, 0, 3], [1, 2, 0]]
TIMES, CLASSES = [1, 0], [0, 2]
MASK = np.tril(np.ones([3, 3])) - 1  # [L, S], 0 where attention may look and -1 where it should rather not


def geglu(x, weight, bias):
    """The gated layer of a transformer's feed-forward part: half of a linear layer, times gelu of the rest."""
    value, gate = functional.linear(x, weight, bias).chunk(2, axis=-1)
    return value * functional.gelu(gate)


def group_norm(x, weight, bias):
    """As the layers call it; Paddle 2.6 has no function for it."""
    return paddle._C_ops.group_norm(x, weight, bias, 1e-5, 2, "NCHW")


def attention_of_products(query, key, value):
    """Attention as the UNets and the prior compute it, [B, H, L, D]."""
    scores = paddle.matmul(query * 0.5, key, transpose_y=True) + to(query, MASK)
    return paddle.matmul(functional.softmax(scores, axis=-1), value)


def joint_attention(query, key, value):
    """As SD3's transformer calls it, [B, L, H, D]."""
    return functional.scaled_dot_product_attention_(query, key, value, dropout_p=0.0, is_causal=False)


def to(tensor, array):
    """An array as a tensor of the type of another."""
    return paddle.to_tensor(array, dtype=tensor.dtype)


def norms(function, *shape, channels):
    """A norm with and without weight and bias, which are None where there is none."""
    inputs = {"x": shape, "weight": [channels], "bias": [channels]}
    return {
        f"{function.__name__}{'' if len(names) == 3 else ' of ' + ', '.join(names)}": (
            lambda x, weight=None, bias=None: function(x, weight, bias),
            {name: inputs[name] for name in names},
        )
        for names in (["x", "weight", "bias"], ["x", "weight"], ["x", "bias"], ["x"])
    }


def layer_norm(x, weight, bias):
    return functional.layer_norm(x, x.shape[-1], weight, bias)


CONVOLUTION = {"x": [2, 4, 5, 5], "weight": [6, 4, 3, 3], "bias": [6]}
LINEAR = {"x": [2, 3, 4], "weight": [4, 6], "bias": [6]}
QUERIES = {"query": [1, 2, 3, 4], "key": [1, 2, 3, 4], "value": [1, 2, 3, 4]}
PAIR, VECTORS, PIXELS = {"x": [2, 3, 4], "y": [3, 1]}, {"x": [2, 3, 4]}, {"x": [1, 2, 4, 4]}

# {name: (function of Paddle tensors, {input: shape})}; what is replaced in Paddle for speed is looked up when called.
OPERATORS = {
    **norms(layer_norm, 2, 3, 6, channels=6),
    **norms(group_norm, 2, 4, 3, 3, channels=4),
    "group_norm of tokens": (group_norm, {"x": [2, 4, 5], "weight": [4], "bias": [4]}),
    "linear": (lambda x, weight, bias: functional.linear(x, weight, bias), LINEAR),
    "linear without bias": (lambda x, weight: functional.linear(x, weight), {"x": [2, 3, 4], "weight": [4, 6]}),
    "conv2d": (lambda x, weight, bias: functional.conv2d(x, weight, bias, padding=1), CONVOLUTION),
    "conv2d of a stride": (lambda x, weight, bias: functional.conv2d(x, weight, bias, 2, 1), CONVOLUTION),
    "conv2d in groups": (
        lambda x, weight: functional.conv2d(x, weight, groups=2),
        {"x": [2, 4, 5, 5], "weight": [6, 2, 3, 3]},
    ),
    "conv2d of one pixel": (
        lambda x, weight, bias: functional.conv2d(x, weight, bias),
        {"x": [2, 4, 3, 3], "weight": [6, 4, 1, 1], "bias": [6]},
    ),
    "avg_pool2d": (lambda x: functional.avg_pool2d(x, 2, 2), PIXELS),
    "interpolate": (lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"), PIXELS),
    "interpolate to a size": (lambda x: functional.interpolate(x, size=[7, 5], mode="nearest"), PIXELS),
    "pad": (lambda x: functional.pad(x, (0, 1, 0, 1), mode="constant", value=0), PIXELS),
    "silu": (functional.silu, VECTORS),
    "gelu": (functional.gelu, VECTORS),
    "gelu by tanh": (lambda x: functional.gelu(x, approximate=True), VECTORS),
    "quick gelu": (lambda x: x * functional.sigmoid(1.702 * x), VECTORS),
    "geglu": (geglu, LINEAR),
    "softmax": (functional.softmax, VECTORS),
    "attention": (attention_of_products, QUERIES),
    "joint attention": (joint_attention, QUERIES),
    "embedding": (lambda weight: functional.embedding(paddle.to_tensor(IDS), weight), {"weight": [4, 3]}),
    "cross_entropy": (
        lambda x: functional.cross_entropy(x, paddle.to_tensor(CLASSES), reduction="none"),
        {"x": [2, 3]},
    ),
    "cross_entropy of shares": (
        lambda x: functional.cross_entropy(x, to(x, [[0.2, 0.8, 0], [0, 0.5, 0.5]]), soft_label=True),
        {"x": [2, 3]},
    ),
    "binary_cross_entropy": (
        lambda x: functional.binary_cross_entropy_with_logits(x, to(x, [1, 0, 1]), reduction="none"),
        {"x": [3]},
    ),
    "matmul": (paddle.matmul, {"x": [2, 3, 4], "y": [2, 4, 2]}),
    "matmul transposed": (lambda x, y: paddle.matmul(x, y, True, True), {"x": [2, 4, 3], "y": [2, 2, 4]}),
    "bmm": (paddle.bmm, {"x": [2, 3, 4], "y": [2, 4, 2]}),
    "add": (lambda x, y: x + y, PAIR),
    "subtract": (lambda x, y: x - y, PAIR),
    "multiply": (lambda x, y: x * y, PAIR),
    "divide": (lambda x, y: x / y, PAIR),
    "divide by a number": (lambda x: x / 3.0 + 1.0 / (2.0 + x.square()), VECTORS),
    "square root": (lambda x: (x.square() + 1).sqrt(), VECTORS),
    "clip": (lambda x: paddle.clip(x, -0.5, 0.5), VECTORS),
    "cast": (lambda x: x.astype("float64") * 2, VECTORS),
    "mean": (lambda x: x.mean(axis=[1, 2]), VECTORS),
    "sum": (lambda x: x.sum(-1, keepdim=True), VECTORS),
    "concat": (lambda x, y: paddle.concat([x, y], axis=1), {"x": [2, 3, 4], "y": [2, 1, 4]}),
    "stack": (lambda x, y: paddle.stack([x, y]), {"x": [2, 3], "y": [2, 3]}),
    "split": (lambda x: x.chunk(2, axis=-1)[1] - x.chunk(2, axis=-1)[0], VECTORS),
    "slice": (lambda x: x[:, :2] * x[:, -1:], VECTORS),
    "expand": (lambda x, y: y.expand([2, 3, 4]) * x, PAIR),
    "reshape": (lambda x: x.flatten(1).reshape([2, 2, 6]).unsqueeze(1).transpose([0, 3, 1, 2]).squeeze(2), VECTORS),
    "gather_nd": (lambda x: x.gather_nd(paddle.to_tensor([[0, 2], [1, 0]])), VECTORS),
    "rows": (lambda x: x[paddle.arange(2), paddle.to_tensor(TIMES)], VECTORS),
}


def inputs_of(name) -> dict:
    """The arrays that an operator is called with, float64 with no digits that float32 lacks."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    _, shapes = OPERATORS[name]
    arrays = {key: random.uniform(0.3, 1.7, shape) * random.choice([-1, 1], shape) for key, shape in shapes.items()}
    return {key: array.astype("float32").astype("float64") for key, array in arrays.items()}


def wanted_gradients(name) -> list:
    """All choices of inputs of an operator that may ask for their gradients."""
    _, shapes = OPERATORS[name]
    return list(chain.from_iterable(combinations(shapes, count) for count in range(1, len(shapes) + 1)))


def weights_of(shape):
    """What the sum weighs the numbers of an output with whose gradients are compared."""
    return np.random.default_rng(1).standard_normal(shape)


def output_and_gradients(name, wanted, dtype="float32"):
    """An operator's output, and its gradients for the inputs `wanted`, as arrays by their names."""
    function, _ = OPERATORS[name]
    tensors = {
        key: paddle.to_tensor(array, dtype=dtype, stop_gradient=key not in wanted)
        for key, array in inputs_of(name).items()
    }
    y = function(**tensors)
    (y * to(y, weights_of(y.shape))).sum().backward()
    return y, {key: None if tensor.grad is None else tensor.grad.numpy() for key, tensor in tensors.items()}


def kernels_behind(tensor) -> set:
    """The names of what backward passes from a tensor on through."""
    found, todo, seen = set(), [tensor.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None and all(node is not other for other in seen):
            seen.append(node)
            found.add(node.name())
            todo += node.next_functions
    return found
