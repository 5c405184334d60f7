"""One of two ranks that sum gradients in every way; each works out by itself what the sums have to be."""

import ppdiffusers_train  # noqa: F401

import sys
from pathlib import Path

import numpy as np
import paddle
from paddle.distributed.fleet.utils import recompute

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ppdiffusers_train.runtime.distributed import start_ranks  # noqa: E402
from ppdiffusers_train.runtime.gradient_sums import GradientSums  # noqa: E402

WIDTH = 6
SMALL_BUCKETS = 4 * (WIDTH * WIDTH + 2 * WIDTH)  # one weight and two biases
ALL, SKIPPED = (0, 1, 2, 3), None


class Net(paddle.nn.Layer):
    """Four layers, of which a batch names those that it goes through; a tuple of them is recomputed."""

    def __init__(self, dtype, traced):
        super().__init__()
        paddle.seed(7)
        self.layers = paddle.nn.LayerList([paddle.nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        for parameter in self.parameters():
            parameter.set_value(paddle.randn(parameter.shape))
        self.to(dtype=dtype)
        self.run = paddle.jit.to_static(self.through) if traced else self.through

    def through(self, x, places):
        for place in places:
            weight, bias = (numbers.astype("float32") for numbers in self.layers[place].parameters())
            x = paddle.tanh(paddle.matmul(x, weight) + bias)
        return x

    def backward(self, seed, places):
        """The gradients of a batch."""
        x = paddle.to_tensor(np.random.default_rng(seed).normal(size=(3, WIDTH)), dtype="float32")
        x.stop_gradient = False  # or recomputation has no gradient
        for part in places if isinstance(places[0], tuple) else [places]:
            x = recompute(self.run, x, part) if part is not places else self.run(x, part)
        (x**2).mean().backward()


# {what happens: [for each step: what either rank's batches go through, whether something has changed]}
CASES = {
    "as always": [([ALL] * 2, [ALL] * 2, True), *[([ALL] * 3, [ALL] * 2, False)] * 2],
    "a rank without a batch": [
        ([ALL], [ALL], True), ([ALL], [], True), ([ALL], [], False), ([ALL], [ALL], True), ([ALL], [ALL], False),
    ],
    "without a batch at first": [([], [ALL], True), ([ALL], [ALL], True), ([ALL], [ALL], False)],
    "the last sample is skipped": [([ALL] * 2, [ALL] * 2, True), ([ALL, SKIPPED], [ALL] * 2, False)],
    "each rank uses others": [([(0, 1)], [(0, 2)], True), *[([(0, 1)], [(0, 2)], False)] * 2],
    "used later": [([(0, 1)], [(0, 1)], True), ([(0, 1)], [(0, 3, 1)], True), ([(0, 1)], [(0, 3, 1)], False)],
    "used no more": [([ALL], [ALL], True), ([(0, 1)], [(0, 1)], True), ([(0, 1)], [(0, 1)], False)],
    "no sample at all": [
        ([SKIPPED], [], True), ([ALL], [ALL], True), ([SKIPPED], [SKIPPED], True), ([ALL], [ALL], True),
    ],
    "used twice": [([(0, 1, 0)], [(0, 1, 0)], True), ([(0, 1, 0)], [(1, 0, 0)], False)],
    "recomputed": [([((0, 1), (2,))], [((0, 1), (2,))], True), *[([((0, 1), (2,))] * 2, [((0, 1), (2,))], False)] * 2],
    "recomputed, used twice": [
        ([((0, 1), (2, 0))], [((0, 1), (2, 0))], True), *[([((0, 1), (2, 0))] * 2, [((0, 1), (2, 0))], False)] * 2,
    ],
    "recomputed, not always as often": [
        ([((0,), (1,), (0,))], [((0,), (1,))], True),
        ([((0,), (1,))], [((0,), (1,))], False),
        ([((0,), (1,), (0,))], [((0,), (1,))], False),
    ],
    "recomputed, more often": [
        ([((0,), (1,))], [((0,), (1,))], True),
        ([((0,), (1,))], [((0,), (1,), (0,))], True),
        ([((0,), (1,))], [((0,), (1,), (0,))], False),
    ],
}  # fmt: skip
LESS, LATE = ("used no more", "recomputed, not always as often"), "recomputed, more often"


def sums_of(net, batches, rank, step):
    """{name: sum in float32 of the gradients of a rank's batches}, as Paddle adds them up where all is float32."""
    sums = {}
    for i, places in enumerate(batches):
        if places is not SKIPPED:
            net.backward((step, rank, i), places)
            for name, parameter in net.named_parameters():
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.astype("float32").numpy()
                low = parameter.dtype != paddle.float32
                sums[name] = sums[name] + gradient if low and name in sums else gradient
                if low:
                    parameter.clear_gradient(False)
    for parameter in net.parameters():
        parameter.clear_gradient(False)
    return sums


def mean_of(parts):
    """{name: mean over ranks} of what any of two ranks has."""
    half = np.float32(0.5)
    return {
        name: sum(
            half * part[name] if name in part else np.zeros_like(parts[0].get(name, parts[1].get(name)))
            for part in parts
        )
        for name in {**parts[0], **parts[1]}
    }


def check(what, steps, ranks, dtype, traced, owners, bucket_bytes):
    """Run `steps`; returns the squared norm of each one's gradients."""
    net, other = Net(dtype, traced), Net(dtype, False)
    parameters = dict(net.named_parameters())
    owners = owners and {name: i % 2 for i, name in enumerate(parameters)}
    sums = GradientSums(parameters, ranks, owners, bucket_bytes)
    norms = []
    for step, (*batches, changes) in enumerate(steps):
        own = batches[ranks.rank]
        for i, places in enumerate(own):
            with sums.micro_batch(last=i == len(own) - 1):
                if places is not SKIPPED:
                    net.backward((step, ranks.rank, i), places)
        sent = sums._sent == set(sums._bucket_of)
        changed = any(ranks.gather_objects(sums.send_rest()))
        assert changed == changes, (what, step, changed)
        if (
            not changed and own and own[-1] is not SKIPPED and what not in LESS
        ):  # all that has come before is waited for
            assert sent, (what, step, "the last batch's backward pass has sent all buckets")
        sums.finish(changed)
        mean = mean_of([sums_of(other, batches[rank], rank, step) for rank in (0, 1)])
        for name, parameter in parameters.items():
            if name not in mean or (owners and owners[name] != ranks.rank):
                assert parameter.grad is None, (what, step, name)
                continue
            assert parameter.grad.dtype == paddle.float32
            if what == LATE:
                assert np.allclose(parameter.grad.numpy(), mean[name], rtol=1e-5, atol=1e-6), (what, step, name)
            else:
                assert np.array_equal(parameter.grad.numpy(), mean[name]), (what, step, name)
        norms.append(float(sums.squared_norm()))
        expected = sum((gradient.astype("float64") ** 2).sum() for gradient in mean.values())
        assert np.isclose(norms[-1], expected, rtol=1e-5), (what, step, norms[-1], expected)
        for parameter in parameters.values():
            parameter.clear_gradient(False)
    return norms


def main():
    ranks = start_ranks(sharding_degree=2)
    for what, steps in CASES.items():
        for dtype in ("float32", "float16", "bfloat16"):
            if dtype == "float32" or "recomputed" not in what:  # there Paddle adds in the low type
                small = check(what, steps, ranks, dtype, False, False, SMALL_BUCKETS)
                assert check(what, steps, ranks, dtype, False, True, SMALL_BUCKETS) == small
                assert check(what, steps, ranks, dtype, False, True, 2**20) == small
    check("as always", CASES["as always"], ranks, "float32", paddle.framework.use_pir_api(), False, SMALL_BUCKETS)
    print("all sums are right", flush=True)


if __name__ == "__main__":
    main()
