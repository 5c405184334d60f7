"""Whether files hold the tensors of a model, by names and shapes; and if not, what the first differences mean.

Names that earlier releases of the libraries gave are turned into today's by the libraries' own tables.
"""

import paddle
from ppdiffusers.models.normalization import AdaLayerNormContinuous

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tensor_files import FLOATS, Converted, dtype_of

SHOWN = 3  # differences in a message
LORA_WORDS = {"base_layer", "lora", "lora_A", "lora_B", "lora_layer", "lora_linear_layer", "lora_magnitude_vector"}

# First words of the names of encoders' parts that a pipeline may not use: those of CLIP, and those of T5.
TOWERS = {"text_model", "vision_model", "text_projection", "visual_projection", "logit_scale", "decoder", "lm_head"}


def fitting_tensors(model, files) -> dict:
    """`{name: tensor}` of `WeightFiles`, in Paddle's layout, without what the model has no use for.

    Raises:
        UserError: tensors are missing, have other shapes, or are of another model; the message names the first.
    """
    saved, own = paddle_tensors(files, model), model.state_dict()
    found = {id(own[name]) for name in saved if name in own}  # T5's embedding has two names, in torch's files only one
    parameters = {name for name, _ in model.named_parameters()} - unpublished_biases(model)
    missing = [name for name in sorted(parameters) if id(own[name]) not in found]
    unknown = [name for name in sorted(saved.keys() - own.keys()) if matters(name, model, own)]
    wrong = [name for name in sorted(saved.keys() & own.keys()) if shape(saved[name]) != shape(own[name])]
    numbers = [name for name in sorted(saved.keys() & own.keys()) if is_integer(saved[name]) > is_integer(own[name])]
    if numbers:
        raise UserError(
            f"{files.files[0]} holds {numbers[0]} as {saved[numbers[0]].dtype}; expected floating-point numbers "
            f"({len(numbers)} of {len(own)} tensors)"
        )
    if missing or unknown or wrong:
        differences = [f"{name} is {shape(saved[name])}, expected {shape(own[name])}" for name in wrong]
        differences += [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
        first = [*differences[:SHOWN], "…"] if len(differences) > SHOWN else differences
        raise UserError(
            f"{files.files[0]} does not fit a {type(model).__name__} of its config.json: {', '.join(first)} "
            f"({len(differences)} of {len(own)} tensors): {meaning(missing, unknown, wrong, saved, own)}"
        )
    return {name: tensor for name, tensor in saved.items() if name in own}


def paddle_tensors(files, model) -> dict:
    """`{name: tensor}` of `WeightFiles` under today's names, with matrices in Paddle's layout."""
    tensors, own = files.tensors(), model.state_dict()
    for rename in ("_update_deprecated_state_dict", "_convert_deprecated_attention_blocks", "adapt_published"):
        getattr(model, rename, lambda _: None)(tensors)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tensors = {name if name in own else name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    matrices = linear_weights(model) if files.is_torch else ()
    return {name: Converted(tensor, tensor.dtype, name in matrices) for name, tensor in tensors.items()}


def matters(name: str, model, own: dict) -> bool:
    """Whether a tensor that the model does not have means that it is another model.

    torch counts positions in a buffer. Encoders may be saved with towers that a pipeline does not use: CLIP's other
    half, T5's decoder.
    """
    if name.endswith("position_ids"):
        return False
    is_of_other_tower = first_word(name) in TOWERS - set(map(first_word, own)) and hasattr(model, "base_model_prefix")
    return has_lora(name) or not is_of_other_tower


def meaning(missing: list, unknown: list, wrong: list, saved: dict, own: dict) -> str:
    """What differences between a file and a model mean, and what to do."""
    if any(map(has_lora, unknown)):
        return (
            "a LoRA is still attached to this model; save it merged: in diffusers, fuse_lora() and then "
            "unload_lora_weights() before save_pretrained()"
        )
    wrapper = first_word(unknown[0]) if unknown else ""
    if unknown and all(name.startswith(f"{wrapper}.") and name[len(wrapper) + 1 :] in own for name in unknown):
        return f"it was saved from inside a wrapper; remove {wrapper!r} from the names, or save the model that it wraps"
    if wrong and not unknown and all(shape(saved[name]) == shape(own[name])[::-1] for name in wrong):
        return "its matrices are in the other library's layout; the file has a name of the wrong library"
    if wrong:
        return "the weights are those of a model of another size or kind than config.json says"
    if missing and not unknown:
        return "a part of the weights is not there; expected all of them"
    return "the weights are those of another model than config.json says"


def is_integer(tensor) -> bool:
    """Whether a tensor holds no floating-point numbers."""
    return dtype_of(tensor) not in FLOATS


def has_lora(name: str) -> bool:
    """Whether a tensor's name is one of a LoRA, or of a layer that carries one."""
    return not LORA_WORDS.isdisjoint(name.split("."))


def first_word(name: str) -> str:
    return name.split(".")[0]


def shape(tensor) -> list:
    return list(tensor.shape)


def unpublished_biases(model) -> set:
    """Names of the biases, all zero, that ppdiffusers 0.29.0 gives to norms which have none in the published SD3."""
    layers = model.named_sublayers()
    return {f"{name}.norm.bias" for name, layer in layers if isinstance(layer, AdaLayerNormContinuous)}


def linear_weights(model) -> set:
    """Names of the matrices that torch stores transposed."""
    layers = model.named_sublayers(include_self=True)
    return {f"{name}.weight" for name, layer in layers if isinstance(layer, paddle.nn.Linear)}


def require_same_shapes(saved: dict, own: dict, message: str) -> None:
    """Raise a `UserError` that begins with `message` unless both have tensors of the same names and shapes."""

    def found(tensors, name):
        return str(shape(tensors[name])) if name in tensors else "missing"

    wrong = [name for name in sorted({*saved, *own}) if found(saved, name) != found(own, name)]
    if wrong:
        first = f"{wrong[0]} is {found(saved, wrong[0])}, expected {found(own, wrong[0])}"
        raise UserError(f"{message}: {first} ({len(wrong)} differences)")
