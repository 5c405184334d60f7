"""Attention in slices, where Paddle has no kernel that needs no matrices."""

import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional
from ppdiffusers.models import attention_processor as processors

AT_ONCE = 2**25  # elements of attention matrices that are computed together: 128 MiB in float32
# ppdiffusers' plain attention, and the same around `scaled_dot_product_attention_`.
WITH_KERNEL = {
    "AttnProcessor": processors.XFormersAttnProcessor,
    "AttnAddedKVProcessor": processors.XFormersAttnAddedKVProcessor,
}


def enable_sliced_attention(model) -> None:
    """Compute a model's attention in slices where its matrices are large, unless Paddle has a kernel that needs none.

    Attention whose products are computed in float32 whatever the precision is, as in SD 2.1, stays as it is.
    """
    kernel = getattr(functional, "scaled_dot_product_attention_", None)
    if kernel not in (None, functional.scaled_dot_product_attention, sliced_attention):
        return
    functional.scaled_dot_product_attention_ = sliced_attention
    for layer in model.sublayers():
        found = WITH_KERNEL.get(type(getattr(layer, "processor", None)).__name__)
        if found and not layer.upcast_attention:
            layer.set_processor(found())


def sliced_attention(query, key, value, attn_mask=None, scale=None, **options):
    """softmax(scale · Q Kᵀ + mask) V of queries, keys and values [B, N, heads, d], some heads of a sample at a time.

    Slices are computed again in the backward pass, so the matrices of one are in memory, [heads at once, N, M]. The
    arithmetic is that of plain attention. `options` of the kernel that it replaces have no effect, as no model here has
    dropout or causality in its attention.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, rows, heads, _ = query.shape
    if batch * heads * rows * key.shape[1] <= AT_ONCE:
        return attend(query, key, value, attn_mask, scale)
    return SlicedAttention.apply(query, key, value, {"mask": attn_mask, "scale": scale})


def attend(query, key, value, mask, scale):
    """Plain attention: [B, N, h, d], [B, M, h, d], [B, M, h, d] -> [B, N, h, d]."""
    query, key, value = (part.transpose([0, 2, 1, 3]) for part in (query, key, value))
    scores = paddle.matmul(query, key, transpose_y=True) * scale
    if mask is not None:
        scores = scores + mask
    probabilities = functional.softmax(scores.astype("float32"), axis=-1).astype(value.dtype)
    return paddle.matmul(probabilities, value).transpose([0, 2, 1, 3])


class SlicedAttention(PyLayer):
    """`attend` in slices of heads. Only queries, keys and values are kept for the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, options):
        ctx.save_for_backward(query, key, value)
        ctx.options, ctx.autocast = options, autocast_of_now()
        return joined([attend(*parts, **rest) for parts, rest in slices((query, key, value), options)], query.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensor()
        found = []
        for (*parts, part_gradient), rest in slices((query, key, value, gradient), ctx.options):
            parts = [part.detach() for part in parts]
            for part in parts:
                part.stop_gradient = False
            with paddle.enable_grad(), paddle.amp.auto_cast(**ctx.autocast):
                result = attend(*parts, **rest)
            paddle.autograd.backward([result], [part_gradient.astype(result.dtype)])
            found.append([part.grad for part in parts])
        return tuple(joined(list(gradients), query.shape[0]) for gradients in zip(*found))


def slices(tensors, options: dict):
    """Yield some heads of one sample at a time: the same part of each tensor [B, …, heads, d], and of the mask."""
    batch, rows, heads, _ = tensors[0].shape
    together, mask = max(AT_ONCE // (rows * tensors[1].shape[1]), 1), options["mask"]
    for sample in range(batch):
        for start in range(0, heads, together):
            part = slice(start, start + together)
            own = mask if mask is None else mask[sample : sample + 1, part if mask.shape[1] > 1 else slice(None)]
            yield [each[sample : sample + 1, :, part] for each in tensors], {**options, "mask": own}


def joined(parts: list, batch: int):
    """The reverse of `slices`."""
    count = len(parts) // batch
    samples = [paddle.concat(parts[start : start + count], axis=2) for start in range(0, len(parts), count)]
    return paddle.concat(samples, axis=0)


def autocast_of_now() -> dict:
    """The arguments of the `auto_cast` that is in effect."""
    tracer = paddle.base.framework._dygraph_tracer()
    level, dtype = tracer._amp_level, tracer._amp_dtype
    levels = paddle.base.core.AmpLevel
    return {
        "enable": level != levels.O0,
        "level": "O2" if level == levels.O2 else "O1",
        "dtype": "float16" if dtype == "float16" else "bfloat16",
    }
