"""AdamW with block-wise 8-bit moments (Dettmers et al. 2021, arXiv 2110.02861), in Paddle's tensor operations, and the
conversion of its state from and to that of Paddle's AdamW.

A moment is kept as one byte per element and one float32 scale per block. Each step dequantizes it to float32, updates
it as AdamW does, and quantizes it again. An outlier reduces the resolution of its own block alone.
"""

import math
from functools import cache

import numpy as np
import paddle

from ppdiffusers_train.runtime.optimizers.adamw import AdamW, adamw
from ppdiffusers_train.runtime.optimizers.rules import RuleOptimizer

BLOCK = 256  # elements that share a scale; the paper has 2048, smaller blocks are closer to float32 and take 1.5 % more
ADAMW_STATE = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")  # accumulators of Paddle's AdamW
SMALLEST = 4096  # tensors with fewer elements keep float32 moments (section 3)


def dynamic_tree_map(signed: bool) -> np.ndarray:
    """The 256 values in [-1, 1] or [0, 1] that a byte represents, in ascending order (section 1.3 and figure 2).

    Leading zeros of the byte give a power of ten, the rest divides [0.1, 1] evenly: small values keep their relative
    precision over seven orders of magnitude. 0 and 1 are exact.
    """
    positive = []
    for exponent in range(7):
        count = 2 ** (6 - exponent) if signed else 2 ** (7 - exponent)
        edges = np.linspace(0.1, 1, count + 1)
        positive.extend((edges[:-1] + edges[1:]) / 2 * 10.0**-exponent)
    negative = [-value for value in positive] if signed else []
    return np.sort(np.float32([*positive, *negative, 0.0, 1.0]))


class Moments:
    """Quantizes a tensor to 8 bits (`pack`) and back (`unpack`), with the map of signed or of non-negative values."""

    def __init__(self, signed: bool):
        values = dynamic_tree_map(signed)
        self.values = paddle.to_tensor(values)
        self.borders = paddle.to_tensor((values[1:] + values[:-1]) / 2)

    def pack(self, tensor) -> tuple:
        """[n] float32 -> bytes [blocks · BLOCK] uint8, scales [blocks, 1] float32: the nearest value in the map."""
        padding = -tensor.shape[0] % BLOCK
        blocks = (paddle.concat([tensor, paddle.zeros([padding])]) if padding else tensor).reshape([-1, BLOCK])
        scales = blocks.abs().max(axis=1, keepdim=True)
        codes = paddle.searchsorted(self.borders, (blocks / paddle.clip(scales, min=1e-38)).flatten())
        return codes.astype("uint8"), scales

    def unpack(self, codes, scales, size: int):
        """The reverse of `pack`, [size] float32."""
        values = paddle.gather(self.values, codes.astype("int64"))
        return (values.reshape([-1, BLOCK]) * scales).flatten()[:size]


@cache
def maps(signed: bool) -> Moments:
    """The map of signed or of non-negative moments, made once."""
    return Moments(signed)


class AdamW8bit(RuleOptimizer):
    """AdamW whose moments take a quarter of the memory."""

    defaults = AdamW.defaults

    @staticmethod
    def layout(shape, options):
        size = math.prod(shape)
        if size < SMALLEST:
            return {"moment1": ([size], "float32"), "moment2": ([size], "float32")}
        blocks = -(-size // BLOCK)
        codes, scales = ([blocks * BLOCK], "uint8"), ([blocks, 1], "float32")
        return {"moment1_codes": codes, "moment1_scales": scales, "moment2_codes": codes, "moment2_scales": scales}

    def initial_state(self, parameter):
        if parameter.size < SMALLEST:
            return super().initial_state(parameter)
        state, zeros = {}, paddle.zeros([parameter.size])
        store_moments(state, zeros, zeros, maps(signed=True), maps(signed=False))
        return state

    @staticmethod
    def update(value, gradient, state, step, rate, options):
        first, second, state = maps(signed=True), maps(signed=False), dict(state)
        moments = list(float32_moments(state, value.size, first, second))
        flat, *moments = adamw(value.flatten(), gradient.flatten(), moments, step, rate, options)
        store_moments(state, *moments, first, second)
        return flat.reshape(value.shape), state

    @staticmethod
    def update_bytes(size: int) -> int:
        """Temporary bytes while a parameter with `size` elements is updated: moments, change, value and blocks in
        float32, and int64 indices into the map; blocks that need padding are copied once more."""
        return (29 if size % BLOCK else 25) * size


def store_moments(state: dict, moment1, moment2, first: Moments, second: Moments) -> None:
    """Put two moments [n], float32, into the state of a parameter, in the form in which they are kept."""
    if moment1.shape[0] < SMALLEST:
        state["moment1"], state["moment2"] = moment1, moment2
    else:  # one after the other, so that the first is freed
        state["moment1_codes"], state["moment1_scales"] = first.pack(moment1)
        state["moment2_codes"], state["moment2_scales"] = second.pack(moment2)


def float32_moments(state: dict, size: int, first: Moments, second: Moments) -> tuple:
    """Both moments [size], float32, that `store_moments` has put into a state."""
    if "moment1" in state:
        return state["moment1"], state["moment2"]
    return (
        first.unpack(state["moment1_codes"], state["moment1_scales"], size),
        second.unpack(state["moment2_codes"], state["moment2_scales"], size),
    )


def from_adamw(state: dict, beta2: float) -> dict:
    """The state that `AdamW8bit` keeps for a parameter, from that of Paddle's AdamW, `{accumulator: tensor}`.

    Args:
        beta2: of the steps so far, whose number follows from its power. A power of 0 stands for very many.
    """
    power = float(state["beta2_pow_acc_0"])
    steps = round(math.log(power) / math.log(beta2)) - 1 if 0 < power < 1 else 10**6 if power <= 0 else 1
    kept = {"step": paddle.to_tensor([max(steps, 1)], dtype="int64")}
    moments = (state[name].flatten() for name in ("moment1_0", "moment2_0"))
    store_moments(kept, *moments, Moments(signed=True), Moments(signed=False))
    return kept


def to_adamw(state: dict, shape: list, betas: tuple) -> dict:
    """The reverse of `from_adamw`.

    Args:
        shape: of the parameter.
        betas: of the steps that follow.
    """
    moments = float32_moments(state, math.prod(shape), Moments(signed=True), Moments(signed=False))
    powers = (paddle.full([1], beta ** (int(state["step"]) + 1)) for beta in betas)  # those of the next step
    return dict(zip(ADAMW_STATE, (*(moment.reshape(shape) for moment in moments), *powers)))
