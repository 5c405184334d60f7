"""The floating-point operations of a training step, and the peak of GPUs."""

import paddle
from paddle.nn import functional

# Dense peaks in TFLOP/s from NVIDIA's data sheets: float32 without tensor cores, and float16/bfloat16 with them.
PEAKS = {
    "H100": (67, 989),
    "A100": (19.5, 312),
    "A800": (19.5, 312),
    "V100": (15.7, 125),
    "T4": (8.1, 65),
    "4090": (82.6, 165),
    "3090": (35.6, 71),
}


class FlopCounter:
    """A context that counts the operations of the products within it, and of their backward pass.

    Convolutions, linear layers, matrix products and attention: two operations for each multiplication, once for the
    result, once for the gradient of each operand that needs one. Everything else is negligible. Recomputed operations
    count again.
    """

    def __init__(self, enabled: bool = True):
        self.enabled, self.total, self.is_inside, self.originals = enabled, 0, False, []

    def __enter__(self):
        for owner, name, count in (
            (functional.conv, "_conv_nd", convolution),
            (functional, "conv2d", convolution),
            (functional, "conv2d_transpose", transposed_convolution),
            (functional, "linear", linear),
            (paddle, "matmul", product),
            (paddle, "bmm", product),
            (functional, "scaled_dot_product_attention", attention),
            (functional, "scaled_dot_product_attention_", attention),
        ):
            if self.enabled and hasattr(owner, name):
                self.originals.append((owner, name, getattr(owner, name)))
                setattr(owner, name, self.counted(getattr(owner, name), count))
        return self

    def __exit__(self, *_):
        for owner, name, original in self.originals:
            setattr(owner, name, original)

    def counted(self, function, count):
        """`function` that also adds `count` of its result and arguments to the total."""

        def call(*arguments, **options):
            if self.is_inside:  # attention may be computed by products, which are counted already
                return function(*arguments, **options)
            self.is_inside = True
            try:
                result = function(*arguments, **options)
            finally:
                self.is_inside = False
            self.total += count(result, *arguments, **options)
            return result

        return call


def convolution(result, x, weight, *_, **__) -> int:
    """`[B, C, H, W]`, `[N, C / groups, h, w]` -> operations of both passes."""
    return 2 * result.size * (weight.size // weight.shape[0]) * passes(x, weight)


def transposed_convolution(result, x, weight, *_, **__) -> int:
    """`[B, N, H, W]`, `[N, C / groups, h, w]` -> operations of both passes."""
    return 2 * x.size * (weight.size // weight.shape[0]) * passes(x, weight)


def linear(result, x, weight, *_, **__) -> int:
    """`[…, K]`, `[K, N]` -> operations of both passes."""
    return 2 * result.size * weight.shape[0] * passes(x, weight)


def product(result, x, y, transpose_x=False, *_, **__) -> int:
    """`[…, M, K]`, `[…, K, N]` -> operations of both passes."""
    return 2 * result.size * x.shape[-2 if transpose_x else -1] * passes(x, y)


def attention(result, query, key, value, *_, **__) -> int:
    """`[B, L, H, D]`, `[B, S, H, D]` twice -> operations of both passes: two products, of sums over D and over S."""
    scores = 2 * query.size * key.shape[1]
    return scores * (passes(query, key) + 1 + needs_gradient(value) + needs_gradient(query, key))


def needs_gradient(*tensors) -> bool:
    """Whether the gradient of one of the tensors will be computed."""
    return paddle.is_grad_enabled() and any(not tensor.stop_gradient for tensor in tensors)


def passes(*operands) -> int:
    """Number of products: one for the result, and one for the gradient of each operand that needs it."""
    return 1 + sum(needs_gradient(operand) for operand in operands)


def peak_tflops(half_precision: bool):
    """The peak of this process's GPU in TFLOP/s, or None if it is not known. Not tested on a GPU."""
    if not paddle.get_device().startswith("gpu"):
        return None
    name = paddle.device.cuda.get_device_name()
    return next((peaks[half_precision] for gpu, peaks in PEAKS.items() if gpu in name), None)
