"""Every random number of a run, as a pure function of (run seed, position of the sample in the run, name of the draw).

The numbers come from Philox, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"): the seed and the name are its key, the position its counter. So they do not depend on the number of GPUs,
workers or accumulation steps, nor on where a run was stopped; and NumPy draws the same ones on every device.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np

VERSION = 1  # raised when its functions change encoded samples


def generator(seed: int, position: int, name: str) -> np.random.Generator:
    """NumPy's generator of one draw; `position` is the sample's index in the run (or an epoch's number)."""
    name_key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    # Drawing numbers counts up the low words of the counter; the position is in a higher one, so streams never overlap.
    bits = np.random.Philox(
        key=np.array([seed, name_key], dtype=np.uint64), counter=np.array([0, 0, position, 0], dtype=np.uint64)
    )
    return np.random.Generator(bits)


class RowDraws:
    """The random numbers of one sample: NumPy scalars, or arrays of the given shape.

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        position: index of the sample in the run, counted from 0 over all epochs.
    """

    def __init__(self, seed: int, position: int):
        self.seed, self.position = seed, position
        self.drawn = set()  # names of the draws so far
        self._ahead = {}  # {(name, shape): what `normal` will return}

    def _generator(self, name: str) -> np.random.Generator:
        self.drawn.add(name)
        return generator(self.seed, self.position, name)

    def normal(self, name: str, shape=()) -> np.ndarray:
        """Standard normal values of `shape`, float32."""
        if (name, tuple(shape)) in self._ahead:
            return self._ahead[name, tuple(shape)]
        return np.float32(self._generator(name).standard_normal(tuple(shape), dtype=np.float32))

    def draw_ahead(self, normals) -> None:
        """Draw now what later calls of `normal` will return.

        Args:
            normals: (name, shape) of each.
        """
        self._ahead = {(name, shape): self.normal(name, shape) for name, shape in normals}

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> np.float32:
        """A float32 value, uniform in [low, high)."""
        low, high = np.float32(low), np.float32(high)
        fraction = np.float32(self._generator(name).random(dtype=np.float32))
        return min(low + (high - low) * fraction, np.nextafter(high, low))  # the sum may round up to `high`

    def integers(self, name: str, low: int, high: int) -> np.int64:
        """An int64 value, uniform in {low, …, high - 1}."""
        return self._generator(name).integers(low, high, dtype=np.int64)

    def bernoulli(self, name: str, probability: float) -> bool:
        """True with this probability. With 0, nothing is drawn: the sample counts as not random."""
        return probability > 0 and bool(self.uniform(name) < probability)

    def categorical(self, name: str, weights) -> np.int64:
        """An index into `weights` [K], with probability proportional to its weight (none negative, not all zero)."""
        cumulative = np.cumsum(np.asarray(weights, dtype=np.float64))
        number = self._generator(name).random() * cumulative[-1]
        return np.int64(min(np.searchsorted(cumulative, number, side="right"), len(cumulative) - 1))


class Draws:
    """The random numbers of a batch: row by row those of `RowDraws`, stacked into paddle tensors [B, …].

    Args:
        seed: the run's seed.
        positions: the index in the run of each row of the batch.
        to_tensor: converts an array to a tensor; by default `paddle.to_tensor`.
    """

    def __init__(self, seed: int, positions, to_tensor=None):
        self.rows, self.to_tensor = [RowDraws(seed, int(position)) for position in positions], to_tensor
        self.drawn_integers = {}  # {name: values} of the last draws, so that a failed step can name its timesteps
        self.drawn_normals = set()  # (name, shape) of the draws so far

    def keep(self, positions) -> None:
        """Drop all rows but those at these positions."""
        self.rows = [row for row in self.rows if row.position in positions]

    def normal(self, name: str, shape=()):
        """`[B, *shape]` standard normal, float32."""
        self.drawn_normals.add((name, tuple(shape)))
        return self._stack(row.normal(name, shape) for row in self.rows)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0):
        """`[B]` uniform in [low, high), float32."""
        return self._stack(row.uniform(name, low, high) for row in self.rows)

    def integers(self, name: str, low: int, high: int):
        """`[B]` uniform in {low, …, high - 1}, int64."""
        self.drawn_integers[name] = self._stack(row.integers(name, low, high) for row in self.rows)
        return self.drawn_integers[name]

    def categorical(self, name: str, weights):
        """`[B]` indices into `weights` [K], with probability proportional to the weights, int64."""
        self.drawn_integers[name] = self._stack(row.categorical(name, weights) for row in self.rows)
        return self.drawn_integers[name]

    def each(self, function):
        """What `function` returns for the `RowDraws` of each row, arrays of one shape, stacked into `[B, …]`."""
        return self._stack(map(function, self.rows))

    def _stack(self, values):
        import paddle  # here, so that loader workers and tools can draw rows without Paddle

        return (self.to_tensor or paddle.to_tensor)(np.stack(list(values)))


def iterate_draws(seed: int, batches, to_tensor=None):
    """Yield the `Draws` of each of `batches`, an iterable of lists of positions.

    While one is used, a thread draws the normal values of the next: those that batches have used so far.
    """
    normals, ahead = set(), None

    def prepared(positions, normals):
        draws = Draws(seed, positions, to_tensor)
        for row in draws.rows:
            row.draw_ahead(normals)
        return draws

    with ThreadPoolExecutor(1, "draws") as pool:
        for positions, following in pairwise(chain(batches, [None])):
            draws = ahead.result() if ahead else Draws(seed, positions, to_tensor)
            ahead = pool.submit(prepared, following, frozenset(normals)) if following is not None else None
            yield draws
            normals |= draws.drawn_normals
