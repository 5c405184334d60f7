"""Attention in slices: the numbers of plain attention, with and without recompute and a mask, in less memory."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
from paddle.nn import functional

from ppdiffusers_train.models import attention_slices
from tests.conftest import kept_for_backward


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Paddle's own functions again afterwards; one head of the toys is a slice."""
    had = getattr(functional, "scaled_dot_product_attention_", None)
    monkeypatch.setattr(functional, "scaled_dot_product_attention_", had, raising=False)
    if had is None:
        monkeypatch.delattr(functional, "scaled_dot_product_attention_")
    monkeypatch.setattr(attention_slices, "AT_ONCE", 1)


@pytest.mark.parametrize("has_mask", (False, True))
def test_slices_give_the_numbers_of_plain_attention(has_mask):
    paddle.seed(0)
    parts = [paddle.randn([2, rows, 3, 8]) for rows in (5, 7, 7)]
    mask = paddle.randn([2, 3, 5, 7]) if has_mask else None
    found = []
    for compute in (attention_slices.attend, attention_slices.sliced_attention):
        own = [part.clone().detach() for part in parts]
        for part in own:
            part.stop_gradient = False
        result = compute(*own, mask, 0.3)
        (result * paddle.arange(result.size).reshape(result.shape).astype("float32")).sum().backward()
        found.append([tensor.numpy() for tensor in (result, *(part.grad for part in own))])
    for one, other in zip(*found, strict=True):
        assert np.abs(one - other).max() <= 1e-6 * np.abs(one).max()


@pytest.mark.parametrize("name", ["decoder", "decoder_lora"])
@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]], ids=["plain", "recomputed"])
def test_a_unet_gets_the_same_gradients(build, name, flags, monkeypatch):
    sliced = []
    apply = attention_slices.SlicedAttention.apply
    monkeypatch.setattr(attention_slices.SlicedAttention, "apply", lambda *args: sliced.append(1) or apply(*args))
    (plain, expected), (less, gradients) = (
        kept_for_backward(build(name, *flags, f"--attention_slices={value}")) for value in ("no", "auto")
    )
    assert sliced and less <= plain * (1 if flags else 0.95)
    for one, other in zip(expected, gradients, strict=True):
        assert np.abs(one - other).max() <= 1e-6 * max(np.abs(one).max(), 0.1)


@pytest.mark.parametrize("name", ["sd3", "lora_qwen"])
def test_a_transformer_gets_the_same_gradients(build_sd3_module, build_qwen_module, name):
    build, flags = (build_sd3_module, []) if name == "sd3" else (build_qwen_module, ["--no_gradient_checkpointing"])
    found = [kept_for_backward(build(name, *flags, f"--attention_slices={value}")) for value in ("no", "auto")]
    (plain, expected), (less, gradients) = found
    assert less < plain and all(
        np.abs(one - other).max() <= 1e-6 * max(np.abs(one).max(), 0.1)
        for one, other in zip(expected, gradients, strict=True)
    )
