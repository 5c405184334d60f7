"""An optimizer's state under structured parameter names.

Paddle names the state after parameters' automatic names (`linear_7.w_0_moment1_0`), which count the layers a process
has made so far: they differ between a script, a resumed script and another card. Structured names
(`unet.conv_in.weight`) do not.
"""

import paddle

SEPARATOR = "//"


def optimizer_tensors(optimizer, parameters: dict) -> dict:
    """`{"<structured name>//<accumulator>": tensor}`.

    Args:
        optimizer: has taken at least one step, or the result is empty.
        parameters: `{structured name: parameter}` of all that it updates.
    """
    names = sorted(((parameter.name, name) for name, parameter in parameters.items()), key=lambda pair: -len(pair[0]))
    tensors = {}
    for key, value in optimizer.state_dict().items():
        if key == "LR_Scheduler":
            continue
        if key == "master_weights":
            own = {parameter.name: name for name, parameter in parameters.items()}
            tensors.update({f"{own[name]}{SEPARATOR}master_weight": tensor for name, tensor in value.items()})
            continue
        # The longest name first: `linear_1.w_0` is not a prefix of `linear_1.w_0_moment1_0` by accident.
        automatic, structured = next(pair for pair in names if key.startswith(f"{pair[0]}_"))
        tensors[f"{structured}{SEPARATOR}{key[len(automatic) + 1 :]}"] = value
    return tensors


def load_optimizer_tensors(optimizer, parameters: dict, tensors: dict) -> None:
    """Give an optimizer that has not stepped yet the state that `optimizer_tensors` returned."""
    # Paddle 2.6 insists on its learning-rate scheduler's state, which is restored elsewhere: it gets what it has.
    state, master_weights = {k: v for k, v in optimizer.state_dict().items() if k == "LR_Scheduler"}, {}
    for key, value in tensors.items():
        structured, accumulator = key.split(SEPARATOR)
        automatic = parameters[structured].name
        if accumulator == "master_weight":
            master_weights[automatic] = paddle.to_tensor(value)
            continue
        tensor = paddle.to_tensor(value)
        tensor.name = f"{automatic}_{accumulator}"
        state[tensor.name] = tensor
    if master_weights:
        state["master_weights"] = master_weights
    optimizer.set_state_dict(state)
