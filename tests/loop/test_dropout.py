"""Dropout that follows the samples."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
from paddle.distributed.fleet.utils import recompute

from ppdiffusers_train.draws import Draws
from ppdiffusers_train.loop.dropout import dropout_follows, follow_samples

RATE = 0.25


def net(rate=RATE):
    """Two layers of dropout, so that each has to have masks of its own; the second after rows were folded together."""
    model = paddle.nn.Sequential(paddle.nn.Dropout(rate), paddle.nn.Flatten(0, 1), paddle.nn.Dropout(rate))
    follow_samples([model])
    return model


def kept(model, positions, seed=3):
    """What of [B, 4, 500] ones comes through, [B, 4, 500]."""
    x = paddle.ones([len(positions), 4, 500])
    with dropout_follows(Draws(seed, positions)):
        return model(x).numpy().reshape(x.shape)


def test_a_samples_mask_is_its_own_in_any_batch_and_on_any_rank():
    model = net()
    together = kept(model, [7, 8, 9])
    paddle.seed(99)
    assert np.array_equal(together[[2, 0]], kept(model, [9, 7])) and np.array_equal(together[1:2], kept(model, [8]))


def test_masks_differ_between_samples_layers_and_seeds_and_keep_the_expected_share():
    model = net()
    masks = kept(model, [1, 2])
    assert not np.array_equal(masks[0], masks[1]) and not np.array_equal(masks, kept(model, [1, 2], seed=4))
    scale = 1 / (1 - RATE)
    assert set(np.unique(masks).round(4)) == {0, np.float32(scale**2).round(4)}, "the layers drop the same elements"
    assert abs((masks > 0).mean() - (1 - RATE) ** 2) < 0.03


def test_recomputation_drops_the_same_elements_again():
    gradients = []
    for run in (lambda model, x: model(x), recompute):
        model, x = net(), paddle.ones([2, 4, 500])
        x.stop_gradient = False
        with dropout_follows(Draws(3, [5, 6])):
            y = run(model, x)
            (y * y).sum().backward()
        gradients.append(x.grad.numpy())
    assert np.array_equal(*gradients) and (gradients[0] == 0).any()


def test_nothing_is_dropped_in_evaluation_and_paddles_own_draws_outside():
    model = net()
    assert (kept(model, [1]) == 0).any()
    x = paddle.ones([1, 4, 500])
    paddle.seed(1)
    one = model(x)
    paddle.seed(2)
    assert not np.array_equal(one, model(x))
    model.eval()
    assert np.array_equal(kept(model, [1]), x)
