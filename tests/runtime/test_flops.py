"""Operations are counted as a hand counts them."""

import ppdiffusers_train  # noqa: F401

import paddle
import pytest
from paddle import nn
from paddle.nn import functional
from ppdiffusers import UNet2DConditionModel

from ppdiffusers_train.cpu.patches import apply_patches, remove_patches
from ppdiffusers_train.reporting.progress import Progress
from ppdiffusers_train.runtime.flops import FlopCounter

BATCH, SIDE, TOKENS, C, TIME, TEXT = 2, 8, 5, 8, 32, 6  # C: channels; TIME: of the time embedding; TEXT: of the caption


def small_unet():
    """One level with attention, a middle block with attention, one layer each."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(C,),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def convolution(inputs, outputs, side):
    return 2 * SIDE * SIDE * inputs * outputs * side * side


def linear(rows, inputs, outputs):
    return 2 * rows * inputs * outputs


def by_hand():
    """(operations of a forward pass per sample, those of products whose first operand needs no gradient)."""
    pixels = SIDE * SIDE
    embedding = linear(1, C, TIME) + linear(1, TIME, TIME)
    resnet = 2 * convolution(C, C, 3) + linear(1, TIME, C)
    # Going up, as many channels again come from the way down, and a convolution of one pixel brings them by.
    resnet_up = convolution(2 * C, C, 3) + convolution(C, C, 3) + linear(1, TIME, C) + convolution(2 * C, C, 1)
    itself = 4 * linear(pixels, C, C) + 2 * linear(pixels, C, pixels)
    caption = 2 * linear(TOKENS, TEXT, C)
    other = 2 * linear(pixels, C, C) + caption + 2 * linear(pixels, C, TOKENS)
    gated = linear(pixels, C, 8 * C) + linear(pixels, 4 * C, C)
    transformer = 2 * convolution(C, C, 1) + itself + other + gated
    ends = convolution(4, C, 3) + convolution(C, 4, 3)
    # Down 1 of each; in the middle 2 and 1; up 2 and 2.
    total = embedding + ends + 3 * resnet + 2 * resnet_up + 4 * transformer
    return total, convolution(4, C, 3) + linear(1, C, TIME) + 4 * caption


def run(unet):
    noisy, text = paddle.randn([BATCH, 4, SIDE, SIDE]), paddle.randn([BATCH, TOKENS, TEXT])
    return unet(noisy, paddle.to_tensor([1, 2]), encoder_hidden_states=text).sample


@pytest.fixture(params=[False, True], ids=["plain", "patched"])
def with_patches(request):
    """With Paddle's functions and with those of cpu/patches.py: what is computed is the same."""
    remove_patches()
    if request.param:
        apply_patches()
    yield
    remove_patches()


def test_a_small_unet_is_counted_as_by_hand(with_patches):
    unet, (forward, without) = small_unet(), by_hand()
    with FlopCounter() as counter:
        run(unet).sum().backward()
    assert counter.total == BATCH * (3 * forward - without)
    with FlopCounter() as counter, paddle.no_grad():
        run(unet)
    assert counter.total == BATCH * forward


def test_what_is_frozen_costs_no_gradient():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    model[1].weight.stop_gradient = True
    with FlopCounter() as counter:
        model(paddle.randn([2, 3]))
    assert counter.total == 2 * linear(2, 3, 5) + 2 * linear(2, 5, 7)


@pytest.mark.parametrize("is_trained", [False, True])
def test_attention_is_counted_as_the_products_that_it_is_made_of(is_trained):
    query, key, value = (paddle.randn([2, length, 4, 8]) for length in (6, 5, 5))
    query.stop_gradient = key.stop_gradient = value.stop_gradient = not is_trained
    with FlopCounter() as fused:
        functional.scaled_dot_product_attention(query, key, value)
    with FlopCounter() as products:
        rows = [tensor.transpose([0, 2, 1, 3]) for tensor in (query, key, value)]
        paddle.matmul(functional.softmax(paddle.matmul(rows[0], rows[1], transpose_y=True)), rows[2])
    assert fused.total == products.total == (3 if is_trained else 1) * 2 * 2 * 2 * 4 * 6 * 5 * 8


def test_functions_are_put_back_and_a_counter_that_is_off_changes_none():
    before = paddle.matmul, functional.linear
    with FlopCounter(enabled=False) as off:
        assert (paddle.matmul, functional.linear) == before
        paddle.matmul(paddle.ones([2, 2]), paddle.ones([2, 2]))
    with FlopCounter():
        assert paddle.matmul is not before[0]
    assert (paddle.matmul, functional.linear) == before and off.total == 0


def test_the_progress_line_shows_utilisation_where_all_is_known(capsys):
    with Progress(0, 2, visible=True, peak_tflops=2.0) as progress:
        assert progress.counts_next and progress.utilisation(10) == ""
        progress.counted(4 * 10**11, samples=2)
        assert not progress.counts_next and progress.utilisation(5) == " 50% of peak"
        progress.add_step(0.5, 1e-4, 2)
    assert "% of peak" in capsys.readouterr().err
    assert not Progress(0, 2, visible=False).counts_next


def test_a_run_with_a_known_peak_shows_it(train_decoder, capsys):
    train_decoder("--peak_tflops=1e-6")
    assert "% of peak" in capsys.readouterr().err
    train_decoder("--peak_tflops=1e-6", "--gradient_checkpointing", out="recomputed")
    assert "% of peak" not in capsys.readouterr().err
