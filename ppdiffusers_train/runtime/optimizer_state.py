"""An optimizer's state under structured parameter names.

Paddle names the state after parameters' automatic names (`linear_7.w_0_moment1_0`), which count the layers that a
process has created so far: they may differ between a script, a resumed script and another rank. Structured names
(`unet.conv_in.weight`) do not. Under O2 Paddle names the state after the float32 master of a parameter; here it has the
same name in every precision. The masters are not part of the state: they are the weights that a checkpoint holds.
"""

from functools import partial

import numpy as np
import paddle
from paddle.base.layer_helper import LayerHelper

from ppdiffusers_train.runtime.adamw_8bit import ADAMW_STATE, AdamW8bit, from_adamw, to_adamw

SEPARATOR, OF_MASTER = "//", "fp32_master_0_"


def optimizer_tensors(optimizer, parameters: dict) -> dict:
    """`{"<structured name>//<accumulator>": tensor}`.

    Args:
        optimizer: has taken at least one step, or the result is empty.
        parameters: `{structured name: parameter}` of all parameters that it updates.
    """
    names = sorted(((parameter.name, name) for name, parameter in parameters.items()), key=lambda pair: -len(pair[0]))
    tensors = {}
    for key, value in optimizer.state_dict().items():
        if key in ("LR_Scheduler", "master_weights"):
            continue
        # The longest name first: `linear_1.w_0` is not a prefix of `linear_1.w_0_moment1_0` by accident.
        automatic, structured = next(pair for pair in names if key.startswith(f"{pair[0]}_"))
        tensors[f"{structured}{SEPARATOR}{key[len(automatic) + 1 :].removeprefix(OF_MASTER)}"] = value
    return tensors


def load_optimizer_tensors(optimizer, parameters: dict, tensors: dict) -> None:
    """Load the state that `optimizer_tensors` returned into an optimizer before its first step, one tensor at a time.

    Args:
        parameters: `{structured name: parameter}` of those that it updates on this rank; other state is ignored.
        tensors: `{name: array}`, or objects with a method `numpy` that reads the array.
    """
    arrays = own_state(parameters, tensors)
    if has_counts(arrays):
        named = ((parameters[key.split(SEPARATOR)[0]].name, key.split(SEPARATOR)[1]) for key in arrays)
        optimizer.set_state_dict({"_".join(name): as_tensor(value) for name, value in zip(named, arrays.values())})
        return
    # `set_state_dict` keeps the tensors, and the first step copies them: moments would be in memory twice for a while.
    used = {key.split(SEPARATOR)[0] for key in arrays}
    inner = getattr(optimizer, "_inner_opt", optimizer)  # of a sharded one
    inner.helper = LayerHelper(type(inner).__name__)  # as the first step begins in Paddle 2.6
    block = paddle.base.framework.default_main_program().global_block()
    inner._create_accumulators(block, [parameter for name, parameter in parameters.items() if name in used])
    for key, tensor in optimizer_tensors(optimizer, parameters).items():
        tensor.set_value(as_tensor(arrays[key]))


def own_state(parameters: dict, tensors: dict) -> dict:
    """The state of these parameters under the names of now: earlier versions named it after masters, and saved masters,
    too."""
    named = {}
    for key, value in tensors.items():
        structured, accumulator = key.split(SEPARATOR)
        if structured in parameters and accumulator != "master_weight":
            named[f"{structured}{SEPARATOR}{accumulator.removeprefix(OF_MASTER)}"] = value
    return named


def in_form_of(optimizer, parameters: dict, tensors: dict, beta2: float) -> dict:
    """The state of an optimizer of the other kind, AdamW or `AdamW8bit`, as `load_optimizer_tensors` takes it for this
    one.

    Args:
        parameters, tensors: see `load_optimizer_tensors`.
        beta2: that of the steps that the state comes from.
    """
    inner, states = getattr(optimizer, "_inner_opt", optimizer), {}
    for key, value in own_state(parameters, tensors).items():
        name, accumulator = key.split(SEPARATOR)
        states.setdefault(name, {})[accumulator] = value
    found = {}
    for name, state in states.items():
        if isinstance(inner, AdamW8bit):
            state = from_adamw({accumulator: as_tensor(value) for accumulator, value in state.items()}, beta2)
        else:
            state = adamw_later(state, parameters[name].shape, (inner._beta1, inner._beta2))
        found |= {f"{name}{SEPARATOR}{accumulator}": value for accumulator, value in state.items()}
    return found


def adamw_later(state: dict, shape: list, betas: tuple) -> dict:
    """What `to_adamw` returns, each computed when it is fetched: float32 moments take four times the memory."""

    def compute(name):
        return to_adamw({key: as_tensor(value) for key, value in state.items()}, shape, betas)[name]

    return {name: Computed(partial(compute, name)) for name in ADAMW_STATE}


class Computed:
    """A tensor that is computed when it is fetched."""

    def __init__(self, compute):
        self.compute = compute

    def numpy(self):
        """The tensor as an array."""
        return self.compute().numpy()


def as_tensor(value):
    """A tensor of an array, or of an object with a method `numpy` that reads one."""
    array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    return paddle.to_tensor(array.view("uint16") if array.dtype.name == "bfloat16" else array)  # Paddle's bfloat16


def has_counts(tensors: dict) -> bool:
    """Whether `{name: tensor}` of a checkpoint are those of a `RuleOptimizer`, which counts each parameter's steps."""
    return any(key.endswith(f"{SEPARATOR}step") for key in tensors)
