"""AdamW with 8-bit moments, against float32 AdamW and against the map's definition."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest

from ppdiffusers_train.runtime.adamw_8bit import BLOCK, AdamW8bit, Moments, dynamic_tree_map
from ppdiffusers_train.runtime.optimizer_state import in_form_of, load_optimizer_tensors, optimizer_tensors
from tests.conftest import optimizer_state, same, scalars, tensors, weights

OPTIONS = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1}


def test_the_maps_have_256_numbers_with_exact_zero_and_one_and_seven_orders_of_magnitude():
    signed, unsigned = dynamic_tree_map(True), dynamic_tree_map(False)
    for values in (signed, unsigned):
        assert len(values) == 256 == len(set(values.tolist())) and {0.0, 1.0} <= set(values.tolist())
        assert (np.diff(values) > 0).all()
    assert signed[0] == pytest.approx(-0.9929688) and unsigned[0] == 0
    assert unsigned[1] == pytest.approx(0.325e-6) and signed[signed > 0][0] == pytest.approx(0.55e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_come_back_as_the_nearest_of_the_map_times_their_blocks_largest(signed):
    random, moments, values = np.random.default_rng(0), Moments(signed), dynamic_tree_map(signed)
    numbers = np.float32(random.standard_normal(2 * BLOCK + 5) * 10.0 ** random.uniform(-5, 0, 2 * BLOCK + 5))
    numbers = numbers if signed else np.abs(numbers)
    codes, scales = moments.pack(paddle.to_tensor(numbers))
    back = moments.unpack(codes, scales, len(numbers)).numpy()
    assert codes.dtype == paddle.uint8 and codes.shape == [3 * BLOCK] and scales.shape == [3, 1]
    for start in range(0, len(numbers), BLOCK):
        block, largest = numbers[start : start + BLOCK], np.abs(numbers[start : start + BLOCK]).max()
        nearest = np.abs(block[:, None] / largest - values[None]).min(axis=1)
        assert np.allclose(np.abs(block - back[start : start + BLOCK]) / largest, nearest, atol=1e-6)


def test_a_block_of_zeros_stays_zeros():
    codes, scales = Moments(True).pack(paddle.zeros([BLOCK]))
    assert Moments(True).unpack(codes, scales, BLOCK).abs().sum() == 0


def steps(optimizer_class, size, count):
    """A parameter after `count` steps with given gradients, and its optimizer."""
    random = np.random.default_rng(1)
    parameter = paddle.create_parameter([size], "float32")
    parameter.set_value(np.float32(random.standard_normal(size)))
    optimizer = optimizer_class(learning_rate=0.01, parameters=[parameter], **OPTIONS)
    for _ in range(count):
        (parameter * paddle.to_tensor(np.float32(random.standard_normal(size) + 0.3))).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    return parameter.numpy(), optimizer


def test_small_tensors_are_updated_as_adamw_does():
    ours, theirs = (steps(kind, 100, 20)[0] for kind in (AdamW8bit, paddle.optimizer.AdamW))
    assert np.allclose(ours, theirs, atol=1e-6)


def test_large_tensors_are_updated_nearly_as_adamw_does_with_a_quarter_of_the_state():
    (ours, optimizer), (theirs, other) = (steps(kind, 10_000, 20) for kind in (AdamW8bit, paddle.optimizer.AdamW))
    start = steps(AdamW8bit, 10_000, 0)[0]
    assert np.abs(ours - theirs).mean() < 0.05 * np.abs(theirs - start).mean()
    sizes = [
        sum(t.numpy().nbytes for k, t in o.state_dict().items() if k != "LR_Scheduler") for o in (optimizer, other)
    ]
    assert sizes[0] < 0.3 * sizes[1]


def test_a_resumed_run_has_the_same_bits(train):
    flags = ["--use_8bit_adam", "--max_train_steps=6", "--checkpointing_steps=6"]
    whole = train("prior", *flags, out="whole")
    train("prior", *flags, "--max_train_steps=3", "--checkpointing_steps=3", out="parts")
    parts = train("prior", *flags, "--resume_from_checkpoint=latest", out="parts")
    assert same(weights(whole, "prior"), weights(parts, "prior"))
    state = tensors(whole / "checkpoint-6" / "optimizer.safetensors")
    assert same(state, optimizer_state(parts / "checkpoint-6"))
    assert {str(array.dtype) for array in state.values()} == {"uint8", "float32", "int64"}


@pytest.mark.slow
def test_a_runs_losses_stay_within_two_percent_of_adamws_over_two_hundred_steps(train, tmp_path):
    flags = [
        "--max_train_steps=200",
        "--train_batch_size=4",
        "--learning_rate=3e-5",
        f"--encoded_cache_dir={tmp_path / 'cache'}",
    ]
    losses = [scalars(train("prior", *flags, *more, out=f"{len(more)}")) for more in ([], ["--use_8bit_adam"])]
    means = [np.reshape(curve, [10, 20]).mean(axis=1) for curve in losses]
    assert losses[0] != losses[1] and means[0][-1] < 0.5 * means[0][0], "the loss falls"
    assert np.abs(means[1] / means[0] - 1).max() < 0.02


@pytest.mark.parametrize("flag", ["--amp_level=O2"])
def test_what_it_cannot_do_is_refused(train, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        train("prior", "--use_8bit_adam", flag)
    assert stopped.value.code == 2 and "--use_8bit_adam: its state can be neither" in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.parametrize("kind, other", [(paddle.optimizer.AdamW, AdamW8bit), (AdamW8bit, paddle.optimizer.AdamW)])
def test_the_state_of_each_becomes_that_of_the_other(kind, other):
    """After 25 steps, two more of the other kind move the parameters nearly as two more of the same."""

    def go_on(optimizer, parameters):
        for gradient in (0.2, -0.1):
            for parameter in parameters.values():
                parameter.grad = paddle.full(parameter.shape, gradient)
            optimizer.step()
            optimizer.clear_grad()
        return np.concatenate([parameter.numpy().ravel() for parameter in parameters.values()])

    random, shapes = np.random.default_rng(2), {"large": [100, 90], "small": [7]}

    def build(kind, values):
        parameters = {name: paddle.create_parameter(shape, "float32") for name, shape in shapes.items()}
        for name, parameter in parameters.items():
            parameter.set_value(values[name])
        return parameters, kind(learning_rate=0.01, parameters=list(parameters.values()), **OPTIONS)

    parameters, optimizer = build(kind, {n: np.float32(random.standard_normal(s)) for n, s in shapes.items()})
    for _ in range(25):
        for parameter in parameters.values():
            parameter.grad = paddle.to_tensor(np.float32(random.standard_normal(parameter.shape) + 0.3))
        optimizer.step()
        optimizer.clear_grad()
    state = {name: tensor.numpy() for name, tensor in optimizer_tensors(optimizer, parameters).items()}
    start = np.concatenate([parameter.numpy().ravel() for parameter in parameters.values()])
    others, converted = build(other, {name: parameter.numpy() for name, parameter in parameters.items()})
    tensors = in_form_of(converted, others, state, OPTIONS["beta2"])
    load_optimizer_tensors(converted, others, tensors)
    if other is AdamW8bit:
        assert set(converted.counts.values()) == {25}
    expected, found = go_on(optimizer, parameters), go_on(converted, others)
    assert np.abs(expected - found).mean() < 0.02 * np.abs(expected - start).mean()
    assert np.allclose(expected[-7:], found[-7:], atol=1e-6), "a small tensor's moments are float32 in both"
