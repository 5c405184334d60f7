"""Batches of samples whose values may differ in length."""

import paddle

VERSION = 1  # raised when its functions change encoded samples


def ragged_names(sample: dict) -> set:
    """Names of values whose length, the first axis of a sample's, may differ from sample to sample: those that have a
    mask beside them, called `<name>_mask`, and the masks. A batch is padded with zeros to its longest sample."""
    return {
        name for mask in sample if mask.removesuffix("_mask") in sample.keys() - {mask} for name in (mask, mask[:-5])
    }


def concat_padded(tensors: list):
    """Tensors [B, L, …] of different lengths, one after the other, padded with zeros to the longest."""
    longest = max(tensor.shape[1] for tensor in tensors)
    return paddle.concat(
        [
            tensor
            if tensor.shape[1] == longest
            else paddle.concat(
                [tensor, paddle.zeros([tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:]], tensor.dtype)], 1
            )
            for tensor in tensors
        ]
    )
