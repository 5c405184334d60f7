"""Frozen weights of linear layers and convolutions in 8 or 4 bits: `--quantize_base`.

A layer keeps codes and scales. Its forward pass dequantizes the weight, its backward pass does so again, and neither
keeps it. Files never hold codes: the base model of a LoRA is not saved.
"""

from functools import cache
from math import ceil, prod

import paddle
from paddle import nn
from paddle.autograd import PyLayer
from paddle.nn import functional

from ppdiffusers_train.module import is_lora
from ppdiffusers_train.runtime import adamw_8bit
from ppdiffusers_train.runtime.adamw_8bit import Moments
from ppdiffusers_train.runtime.precision import keeps_float32

NF4_BLOCK = 64  # elements of a weight that share a scale
# NF4's levels, from quantiles of the normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Classes whose forward pass is known. The weights of others, such as subclasses of them, stay as they are.
KNOWN = ("Linear", "Conv2D", "LoRACompatibleLinear", "LoRACompatibleConv")


class Int8:
    """A signed byte per element, and a float32 scale per output channel: the largest absolute value is 127."""

    @staticmethod
    def layout(shape, axis: int) -> dict:
        """{name: (shape, dtype)} of the tensors of `pack`."""
        return {"codes": (list(shape), "int8"), "scales": (along(shape, axis), "float32")}

    @staticmethod
    def pack(weight, axis: int) -> dict:
        """The tensors of a float32 weight whose output channels lie along `axis`."""
        others = [other for other in range(weight.ndim) if other != axis]
        scales = weight.abs().max(axis=others, keepdim=True) / 127
        codes = (weight / paddle.clip(scales, min=1e-38)).round()
        return {"codes": codes.astype("int8"), "scales": scales}

    @staticmethod
    def unpack(packed: dict, shape):
        """The float32 weight of these tensors."""
        return packed["codes"].astype("float32").multiply_(packed["scales"])


class NF4:
    """Four bits per element, and a scale per block of 64, which is quantized to 8 bits in turn (section 3).

    The mean of the scales is subtracted before they are quantized in blocks of 256.
    """

    @staticmethod
    def layout(shape, axis: int) -> dict:
        """{name: (shape, dtype)} of the tensors of `pack`."""
        blocks = ceil(prod(shape) / NF4_BLOCK)
        groups = ceil(blocks / adamw_8bit.BLOCK)
        return {
            "codes": ([blocks * NF4_BLOCK // 2], "uint8"), "scale_codes": ([groups * adamw_8bit.BLOCK], "uint8"),
            "scale_scales": ([groups, 1], "float32"), "scale_mean": ([1], "float32"),
        }  # fmt: skip

    @staticmethod
    def pack(weight, axis: int) -> dict:
        """The tensors of a float32 weight, in rows of its elements."""
        flat = weight.flatten()
        padding = -flat.shape[0] % NF4_BLOCK
        blocks = (paddle.concat([flat, paddle.zeros([padding])]) if padding else flat).reshape([-1, NF4_BLOCK])
        scales = blocks.abs().max(axis=1, keepdim=True)
        borders = (nf4_levels()[1:] + nf4_levels()[:-1]) / 2
        nearest = paddle.searchsorted(borders, (blocks / paddle.clip(scales, min=1e-38)).flatten(), out_int32=True)
        high, low = nearest.reshape([-1, 2]).unbind(axis=1)
        mean = scales.mean().reshape([1])
        scale_codes, scale_scales = Moments(signed=True).pack(scales.flatten() - mean)
        return {
            "codes": (high * 16 + low).astype("uint8"), "scale_codes": scale_codes, "scale_scales": scale_scales,
            "scale_mean": mean,
        }  # fmt: skip

    @staticmethod
    def unpack(packed: dict, shape):
        """The float32 weight of these tensors."""
        size = prod(shape)
        blocks = ceil(size / NF4_BLOCK)
        scales = Moments(signed=True).unpack(packed["scale_codes"], packed["scale_scales"], blocks)
        values = paddle.gather(nf4_pairs(), packed["codes"].astype("int32")).reshape([-1, NF4_BLOCK])
        values.multiply_((scales + packed["scale_mean"]).reshape([-1, 1]))
        return values.flatten()[:size].reshape(shape) if values.size > size else values.reshape(shape)


KINDS = {"int8": Int8, "nf4": NF4}


def along(shape, axis: int) -> list:
    """[1, …, channels, …, 1]: the shape of a number for each channel along `axis`."""
    return [size if index == axis else 1 for index, size in enumerate(shape)]


def nf4_levels():
    """[16] float32, ascending."""
    return paddle.to_tensor(NF4_LEVELS, dtype="float32")


def nf4_pairs():
    """[256, 2] float32: the two elements that a byte stands for, the first in its high bits."""
    return paddle.stack(paddle.meshgrid(nf4_levels(), nf4_levels()), axis=-1).reshape([256, 2])


class Product(PyLayer):
    """`layer.product(x, weight)` of a quantized layer; the gradient of `x` alone, because the weight is frozen.

    Nothing is saved for the backward pass but the layer itself, whose codes do not change.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        weight = layer.weight
        # Under autocast, the product itself casts both.
        return layer.product(x, weight if weight.dtype == x.dtype else weight.astype(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.layer.weight
        weight = weight if weight.dtype == gradient.dtype else weight.astype(gradient.dtype)
        found = ctx.layer.product_gradient(gradient, weight, ctx.shape)
        return found if found.dtype == ctx.dtype else found.astype(ctx.dtype)


class Quantized:
    """What a quantized layer has in common; `PREFIX` and a name of `layout` are the name of a buffer."""

    PREFIX = "weight_"

    @property
    def weight(self):
        """The weight, dequantized to float32 whenever it is asked for."""
        kind = KINDS[self.quantized_as]
        packed = {name: getattr(self, self.PREFIX + name) for name in kind.layout(self.weight_shape, self.axis)}
        with paddle.no_grad():
            return kind.unpack(packed, self.weight_shape)

    def forward(self, x, scale=1.0):
        """The layer's own output, with that of its LoRA layer times `scale` where it adds one without a hook."""
        y = Product.apply(x, self)
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype).reshape(self.bias_shape)
        lora = self.lora_layer if hasattr(self, "set_lora_layer") else None
        return y if lora is None else y + scale * lora(x)


class QuantizedLinear(Quantized):
    """[…, K] times [K, N]."""

    axis, bias_shape = 1, [-1]

    def product(self, x, weight):
        """[…, N]"""
        return functional.linear(x, weight)

    def product_gradient(self, gradient, weight, shape):
        """The gradient of `x`."""
        return paddle.matmul(gradient, weight, transpose_y=True)


class QuantizedConv(Quantized):
    """[B, C, H, W] with kernels [N, C / groups, h, w]."""

    axis, bias_shape = 0, [-1, 1, 1]

    def product(self, x, weight):
        """[B, N, H', W']"""
        return functional.conv2d(x, weight, None, self._stride, self._padding, self._dilation, self._groups)

    def product_gradient(self, gradient, weight, shape):
        """The gradient of `x`, whose shape is `shape`."""
        options = {"stride": self._stride, "padding": self._padding, "dilation": self._dilation, "groups": self._groups}
        return functional.conv2d_transpose(gradient, weight, output_size=shape[2:], **options)


@cache
def quantized_class(layer_class):
    """A class of quantized layers of a class, of which they stay instances."""
    kind = QuantizedLinear if issubclass(layer_class, nn.Linear) else QuantizedConv
    return type(f"Quantized{layer_class.__name__}", (kind, layer_class), {})


def can_quantize(name: str, layer) -> bool:
    """Whether a layer has a frozen weight that can be quantized."""
    if type(layer).__name__ not in KNOWN or is_lora(f"{name}."):
        return False
    is_plain = isinstance(layer, nn.Linear) or (layer._padding_mode == "zeros" and layer._data_format == "NCHW")
    weight = layer.weight
    return is_plain and weight.stop_gradient and not getattr(weight, "stays_frozen", False)


@paddle.no_grad()
def quantize_layer(layer, kind: str, has_values: bool = True) -> None:
    """Quantize a layer's weight in place and free it.

    Args:
        has_values: whether the weight has values; without, codes are allocated and not computed.
    """
    weight = layer._parameters.pop("weight")
    load_value(weight)
    layer.quantized_as, layer.weight_shape = kind, list(weight.shape)
    layer.__class__ = quantized_class(type(layer))
    layout = KINDS[kind].layout(layer.weight_shape, layer.axis)
    weight = weight.to(paddle.get_device())  # it may have been loaded on the host
    packed = KINDS[kind].pack(weight, layer.axis) if has_values else {}
    for name, (shape, dtype) in layout.items():
        tensor = packed[name] if has_values else paddle.empty(shape, dtype)
        layer.register_buffer(layer.PREFIX + name, tensor, persistable=False)


def load_value(parameter) -> None:
    """Read a parameter's value where that was left for later, see `models.unloaded.values_later`."""
    if hasattr(parameter, "load_value"):
        parameter.load_value()
        del parameter.load_value


def quantize_models(module, has_values: bool = True) -> list:
    """Quantize the frozen weights of the models that `module.quantized` names, one layer after the other.

    Models of the module that were loaded on the host are moved to the device in use.

    Args:
        has_values: see `quantize_layer`.
    Returns:
        a line for each of these models.
    """
    lines = []
    for model_name, kind in module.quantized.items():
        model = getattr(module, model_name)
        if keeps_float32(module, model_name, "no"):
            continue
        for name, layer in model.named_sublayers():
            if can_quantize(name, layer):
                quantize_layer(layer, kind, has_values)
        for parameter in model.parameters():
            load_value(parameter)
        lines.append(f"--quantize_base {kind}: {quantized_size(model):,} weights of {model_name}")
    if lines and not paddle.get_device().startswith("cpu"):
        module.to(device=paddle.get_device())
    return lines


def quantized_layers(model) -> list:
    """The quantized layers of a model."""
    return [layer for layer in model.sublayers(include_self=True) if isinstance(layer, Quantized)]


def quantized_size(model) -> int:
    """Number of elements of a model's quantized weights."""
    return sum(prod(layer.weight_shape) for layer in quantized_layers(model))


def code_bytes(model) -> int:
    """Bytes of the codes of a model's quantized weights and scales, without scales in float32."""
    buffers = [buffer for layer in quantized_layers(model) for buffer in layer._buffers.values()]
    return sum(buffer.size for buffer in buffers if not buffer.is_floating_point())
