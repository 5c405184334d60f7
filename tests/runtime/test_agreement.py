"""What ranks compare, without starting any."""

import ppdiffusers_train  # noqa: F401

import copy

import numpy as np
import paddle
import pytest

from ppdiffusers_train.loop.identity import OWN_FLAGS, OWN_PLACES, compared_code, compared_flags
from ppdiffusers_train.runtime.agreement import SAMPLED, disagreement, model_digests
from tests.conftest import ROOT, load_script

SCRIPTS = sorted((ROOT / "examples").glob("*/train_*.py"))


def flags_of(script):
    """A script's flags with a value each, as if all were given, and what each is when it is another one."""
    parser = load_script(script).build_parser()
    args = parser.parse_args([f"{a.option_strings[0]}=x" for a in parser._actions if a.required])
    for action in parser._actions:
        if action.dest in ("help", "config"):
            continue
        value = getattr(args, action.dest)
        if isinstance(value, bool) or value is None and action.nargs == 0:
            yield parser, args, action.dest, not value
        elif action.choices:
            yield parser, args, action.dest, next(choice for choice in action.choices if choice != value)
        else:
            yield parser, args, action.dest, value + 1 if isinstance(value, (int, float)) else f"another {value}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_that_a_rank_may_not_have_for_itself_is_compared(script):
    compared = 0
    for _, args, name, other in flags_of(script):
        changed = copy.copy(args)
        setattr(changed, name, other)
        line = disagreement([compared_flags(a) for a in (args, args, changed)])
        is_own = name in OWN_FLAGS or name in OWN_PLACES and getattr(args, name) is not None
        assert bool(line) != is_own, (name, line)
        compared += bool(line)
        assert not line or line.startswith(f"--{name}: rank 2 has ") and "\n" not in line and len(line) < 250, line
        delattr(changed, name)
        line = disagreement([compared_flags(a) for a in (args, changed)])
        unknown = f"--{name}: rank 1 has nothing, rank 0 has "
        assert line == "" if name in OWN_FLAGS else line.startswith(unknown), line
    assert compared > 50


def test_no_flag_is_excepted_that_no_script_has():
    known = {name for script in SCRIPTS for _, _, name, _ in flags_of(script)}
    assert OWN_FLAGS | OWN_PLACES <= known | {"config"}


def test_values_are_shown_where_they_differ_and_secrets_never(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the-secret-word")
    _, args, _, _ = next(flags_of(SCRIPTS[0]))
    args.tracker_project_name, args.hub_token = "a long name " * 20 + "one", "the-secret-word"
    other = copy.copy(args)
    other.tracker_project_name = "a long name " * 20 + "the-secret-word"
    line = disagreement([compared_flags(args), compared_flags(other)])
    assert 'name one"' in line and 'name ***"' in line and "the-secret-word" not in line and len(line) < 250
    assert "the-secret-word" not in str(compared_flags(args))


def test_equal_ranks_agree():
    assert disagreement([{"a": 1.5, "b": None, "c": ["x"], "d": float("nan")}] * 3) == ""
    assert disagreement([compared_code()] * 2) == "" and len(compared_code()) == 4


class Net(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.model = paddle.nn.Linear(300, 600)
        self.model.register_buffer("seen", paddle.zeros([3]), persistable=False)
        self.low = paddle.nn.Linear(3, 3)
        self.low.to(dtype="bfloat16")


def test_a_models_weights_buffers_types_and_shapes_count():
    paddle.seed(0)
    net = Net()
    weight, bias = net.model.weight, net.model.bias
    before = model_digests(net)
    assert before.keys() == {"weights of model", "weights of low"} and before == model_digests(net)
    assert weight.size > 2 * SAMPLED > bias.size

    def changed(tensor, numbers):
        kept = tensor.clone()
        tensor.set_value(numbers)
        after = model_digests(net)
        tensor.set_value(kept)
        return [name.split()[-1] for name in before if before[name] != after[name]]

    assert changed(weight, weight + 1e-6) == ["model"] and changed(net.model.seen, paddle.ones([3])) == ["model"]
    last = np.zeros(bias.shape, np.float32)
    last[-1] = 1e-6
    assert changed(bias, bias + paddle.to_tensor(last)) == ["model"]
    assert changed(net.low.bias, net.low.bias + 1) == ["low"]
    for column in range(0, 600, 97):  # one that is wrong is met
        numbers = weight.numpy()
        numbers[:, column] += 1
        assert changed(weight, numbers) == ["model"]
    assert model_digests(net) == before
    net.low.to(dtype="float16")
    assert model_digests(net)["weights of low"] != before["weights of low"]
