"""An optimizer's state under structured parameter names.

Paddle names the state after parameters' automatic names (`linear_7.w_0_moment1_0`), which count the layers a process
has made so far: they differ between a script, a resumed script and another rank. Structured names
(`unet.conv_in.weight`) do not. Under O2 Paddle names it after the float32 master of a parameter; here it has the same
name in every precision. Masters themselves are not part of it: they are the weights that a checkpoint holds.
"""

import paddle
from paddle.base.layer_helper import LayerHelper

SEPARATOR, OF_MASTER = "//", "fp32_master_0_"


def optimizer_tensors(optimizer, parameters: dict) -> dict:
    """`{"<structured name>//<accumulator>": tensor}`.

    Args:
        optimizer: has taken at least one step, or the result is empty.
        parameters: `{structured name: parameter}` of all that it updates.
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
    """Give an optimizer that has not stepped yet the state that `optimizer_tensors` returned, a tensor at a time.

    Args:
        parameters: `{structured name: parameter}` of those that it updates on this rank; others' state is not loaded.
        tensors: `{name: array}`, of any number of them, or what has a method `numpy` that fetches one.
    """
    arrays = {}  # earlier versions named state after masters, and wrote masters, too
    for key, value in tensors.items():
        structured, accumulator = key.split(SEPARATOR)
        if structured in parameters and accumulator != "master_weight":
            arrays[f"{structured}{SEPARATOR}{accumulator.removeprefix(OF_MASTER)}"] = value
    if is_8bit(arrays):
        named = ((parameters[key.split(SEPARATOR)[0]].name, key.split(SEPARATOR)[1]) for key in arrays)
        optimizer.set_state_dict({"_".join(name): as_tensor(value) for name, value in zip(named, arrays.values())})
        return
    # `set_state_dict` keeps what it gets, and the first step copies it: for a while, moments would be there twice.
    used = {key.split(SEPARATOR)[0] for key in arrays}
    inner = getattr(optimizer, "_inner_opt", optimizer)  # of a sharded one
    inner.helper = LayerHelper(type(inner).__name__)  # as the first step begins in Paddle 2.6
    block = paddle.base.framework.default_main_program().global_block()
    inner._create_accumulators(block, [parameter for name, parameter in parameters.items() if name in used])
    for key, tensor in optimizer_tensors(optimizer, parameters).items():
        tensor.set_value(as_tensor(arrays[key]))


def as_tensor(value):
    """A tensor of an array, or of what has a method `numpy` that fetches one."""
    return paddle.to_tensor(value.numpy() if hasattr(value, "numpy") else value)


def is_8bit(tensors: dict) -> bool:
    """Whether `{name: tensor}` of a checkpoint are those of `AdamW8bit`, which counts each parameter's steps."""
    return any(key.endswith(f"{SEPARATOR}step") for key in tensors)
