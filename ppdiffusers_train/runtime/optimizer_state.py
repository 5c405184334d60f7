"""An optimizer's state under structured parameter names.

Paddle names the state after parameters' automatic names (`linear_7.w_0_moment1_0`), which count the layers a process
has made so far: they differ between a script, a resumed script and another rank. Structured names
(`unet.conv_in.weight`) do not. Under O2 Paddle names it after the float32 master of a parameter; here it has the same
name in every precision. Masters themselves are not part of it: they are the weights that a checkpoint holds.
"""

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
    masters = optimizer._master_weights
    for key, value in tensors.items():
        structured, accumulator = key.split(SEPARATOR)
        if structured in parameters and accumulator != "master_weight":  # earlier versions wrote masters, too
            automatic = parameters[structured].name
            tensor = paddle.to_tensor(value.numpy() if hasattr(value, "numpy") else value)
            tensor.name = f"{automatic}_{OF_MASTER if automatic in masters else ''}{accumulator}"
            state[tensor.name] = tensor
    optimizer.set_state_dict(state)
