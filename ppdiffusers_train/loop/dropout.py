"""Dropout whose masks depend on the sample alone, as all random numbers of a run do (`draws`).

Paddle's own dropout draws one mask for a batch from the generator of the process: with another number of GPUs, or
another batch size, the same step would drop other elements.
"""

import contextlib

import paddle
from paddle.nn import functional

from ppdiffusers_train.draws import Draws, generator

_current = []  # the `_Seeds` of the batch in its forward or backward pass now, at most one


class _Seeds:
    """A seed for each layer and sample of a batch, as a function of (run seed, position of the sample, layer) alone.

    The layer's number is the key, not a count of calls: recomputation in the backward pass calls dropout again.
    """

    def __init__(self, draws: Draws):
        self.rows, self.by_count = [(row.seed, row.position) for row in draws.rows], {}

    def of_layer(self, number: int, count: int) -> list:
        """The seeds of layer `number` of `count`, one for each sample."""
        if count not in self.by_count:
            streams = [generator(seed, position, "dropout") for seed, position in self.rows]
            self.by_count[count] = [stream.integers(2**31, size=count).tolist() for stream in streams]
        return [seeds[number] for seeds in self.by_count[count]]


@contextlib.contextmanager
def dropout_follows(draws: Draws):
    """A context in which the layers that `follow_samples` has prepared draw their masks from these samples' seeds.

    Args:
        draws: those of the batch, whose backward pass has to be inside the context, too.
    """
    _current.append(_Seeds(draws))
    try:
        yield
    finally:
        _current.pop()


def follow_samples(models) -> None:
    """Prepare the dropout layers of models for `dropout_follows`; those with probability 0 are left alone.

    Outside of that context, and in a graph that Paddle traces, they behave as before.
    """
    layers = [
        layer
        for model in models
        for layer in model.sublayers()
        if isinstance(layer, paddle.nn.Dropout) and layer.p and layer.axis is None
    ]
    for number, layer in enumerate(layers):
        # The class is replaced, because layers exist by then, and a method set on a layer could not be traced.
        layer.__class__, layer.number, layer.count = SampleDropout, number, len(layers)


class SampleDropout(paddle.nn.Dropout):
    """Dropout layer `number` of the `count` in the trained models."""

    def forward(self, x):
        """Drop elements of x [B·k, …], in which each sample has k consecutive rows."""
        if not (_current and self.training and paddle.in_dynamic_mode()):
            return super().forward(x)
        seeds = _current[-1].of_layer(self.number, self.count)
        if x.shape[0] % len(seeds):
            return super().forward(x)
        parts = []
        for seed, part in zip(seeds, x.split(len(seeds)) if len(seeds) > 1 else [x]):
            paddle.seed(seed)
            parts.append(functional.dropout(part, self.p, training=True, mode=self.mode))
        return paddle.concat(parts) if len(parts) > 1 else parts[0]
