"""An optimizer's state under structured parameter names.

Paddle names the state after parameters' automatic names (`linear_7.w_0_moment1_0`), which count the layers a process
has made so far: they differ between a script, a resumed script and another rank. Structured names
(`unet.conv_in.weight`) do not. Under O2 Paddle names it after the float32 master of a parameter; here it has the same
name in every precision. Masters themselves are not part of it: they are the weights that a checkpoint holds.
"""

import numpy as np
import paddle

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
    """Give an optimizer that has not stepped yet the state that `optimizer_tensors` returned.

    Args:
        parameters: `{structured name: parameter}` of those that it updates on this rank; others' state is not loaded.
        tensors: `{name: array}`, of any number of them, or what has a method `numpy` that fetches one.
    """
    # Paddle 2.6 insists on its learning-rate scheduler's state, which is restored elsewhere: it gets what it has. And
    # it drops masters that the state does not name.
    state = {k: v for k, v in optimizer.state_dict().items() if k in ("LR_Scheduler", "master_weights")}
    for key, value in {**unused_state(optimizer, parameters, tensors), **tensors}.items():
        structured, accumulator = key.split(SEPARATOR)
        if structured in parameters and accumulator != "master_weight":  # earlier versions wrote masters, too
            automatic = parameters[structured].name
            of_master = OF_MASTER if automatic in optimizer._master_weights else ""
            tensor = paddle.to_tensor(value.numpy() if hasattr(value, "numpy") else value)
            tensor.name = f"{automatic}_{of_master}{accumulator.removeprefix(OF_MASTER)}"
            state[tensor.name] = tensor
    optimizer.set_state_dict(state)


def is_8bit(tensors: dict) -> bool:
    """Whether `{name: tensor}` of a checkpoint are those of `AdamW8bit`, which counts each parameter's steps."""
    return any(key.endswith(f"{SEPARATOR}step") for key in tensors)


def unused_state(optimizer, parameters: dict, tensors: dict) -> dict:
    """The first state of Paddle's AdamW for parameters that had no gradient when `tensors` were written: where Paddle
    is given any state, it fails when it then misses some."""
    names = {key.split(SEPARATOR)[0] for key in tensors}
    return {
        f"{name}{SEPARATOR}{accumulator}": value
        for name, parameter in parameters.items()
        if names and name not in names and not is_8bit(tensors)
        for accumulator, value in {
            "moment1_0": np.zeros(parameter.shape, "float32"),
            "moment2_0": np.zeros(parameter.shape, "float32"),
            "beta1_pow_acc_0": np.float32([optimizer._beta1]),
            "beta2_pow_acc_0": np.float32([optimizer._beta2]),
        }.items()
    }
