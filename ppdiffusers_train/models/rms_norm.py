"""The norm of today's transformers."""

import paddle
from paddle import nn

VERSION = 1  # raised when its functions change encoded samples


class RMSNorm(nn.Layer):
    """x / sqrt(mean(x²) + ε) · weight, over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467). It computes in
    float32; the result has the type of x."""

    def __init__(self, size: int, epsilon: float = 1e-6):
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x):
        wide = x.astype("float32")
        scale = paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale).astype(x.dtype) * self.weight.astype(x.dtype)
