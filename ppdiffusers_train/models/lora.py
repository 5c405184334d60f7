"""LoRA: trainable low-rank updates of a frozen model's layers (Hu et al. 2021, arXiv 2106.09685).

A layer computes W x + (α / r) · B A x; A [r, in] starts at N(0, 1/r²), B [out, r] at zero, so training starts at the
base model. The layers are ppdiffusers' own, set on the layers that can carry them, so its pipelines use them as they
are. Its writer is not used: it stores no α, refuses models with LoRA on some layers only, and does not transpose.
"""

import contextlib
import math
import sys
from pathlib import Path

import numpy as np
import paddle
from ppdiffusers.models.lora import LoRACompatibleConv, LoRACompatibleLinear, LoRAConv2dLayer, LoRALinearLayer

from ppdiffusers_train.draws import generator
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.lora_files import Update, write_lora
from ppdiffusers_train.models.lora_init import FULL_FILE, LoRASource, initialize, set_values
from ppdiffusers_train.models.lora_libraries import FILES
from ppdiffusers_train.models.weights import linear_weights, require_same_shapes, set_tensors
from ppdiffusers_train.module import freeze, is_lora
from ppdiffusers_train.tensor_files import Converted, dtype_of, open_tensors, write_tensors

ATTENTION_TARGETS = "to_q,to_k,to_v,to_out.0"
ADDED_ATTENTION_TARGETS = f"{ATTENTION_TARGETS},add_k_proj,add_v_proj"  # the added ones process the image embedding
JOINT_ATTENTION_TARGETS = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj"  # of both streams, image's and text's
TEXT_ENCODER_TARGETS = "q_proj,k_proj,v_proj,out_proj"
# All of a UNet's layers that files of LoRA layers have names for.
UNET_TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,downsamplers.0.conv,"
    "upsamplers.0.conv,time_emb_proj"
)
PARAMETERS_FILE = "lora_parameters.safetensors"


def add_lora(model, targets: str, rank: int, alpha=None, dropout: float = 0.0, seed: int = 0, use_rslora=False) -> None:
    """Freeze a model and set LoRA layers on the layers that `targets` names, in float32.

    Args:
        targets: ends of layer names, separated by commas: `"to_q,to_out.0"`.
        rank: r. alpha: α, by default r.
        dropout: probability with which an input of A is dropped in training.
        seed: of the initial values, which are a function of it and the layer's name.
        use_rslora: scale by α / √r instead of α / r (Kalajdzievski 2023, arXiv 2312.03732). The layers then have
            α √r as their α, which every file and reader of LoRA layers understands.
    Raises:
        UserError: a target fits no layer, or `rank` is larger than a layer.
    """
    freeze(model)
    kinds = (LoRACompatibleLinear, LoRACompatibleConv)
    if not hasattr(model, "load_attn_procs"):  # plain linear layers: they get LoRA by a hook
        kinds = (paddle.nn.Linear, LoRACompatibleConv)
    layers = {name: layer for name, layer in model.named_sublayers() if isinstance(layer, kinds)}
    wanted = [target.strip() for target in targets.split(",") if target.strip()]
    if not wanted:
        raise UserError(f"--lora_target_modules: {targets!r} names no layer")
    for target in wanted:
        if not any(is_target(name, target) for name in layers):
            known = sorted(
                {".".join(name.split(".")[-2 if name.split(".")[-1].isdigit() else -1 :]) for name in layers}
            )
            raise UserError(f"--lora_target_modules: no layer is called {target!r}; there are {', '.join(known)}")
    if use_rslora:
        alpha = (alpha or rank) * math.sqrt(rank)
    scale = None if alpha in (None, rank) else float(alpha)
    for name, layer in layers.items():
        if not any(is_target(name, target) for target in wanted):
            continue
        lora = new_lora(layer, rank, scale)
        shape = lora.down.weight.shape
        initial = generator(seed, 0, f"lora {name}").standard_normal(shape, dtype=np.float32) / rank
        lora.down.weight.set_value(initial)
        if dropout:
            lora.dropout = paddle.nn.Dropout(dropout)
            lora.register_forward_pre_hook(lambda lora, inputs: lora.dropout(inputs[0]))
        set_lora(layer, lora)


def new_lora(layer, rank: int, alpha=None):
    """A LoRA layer for a linear layer or a convolution."""
    if isinstance(layer, paddle.nn.Linear):
        return LoRALinearLayer(*layer.weight.shape, rank, alpha)
    return LoRAConv2dLayer(
        layer._in_channels, layer._out_channels, rank, layer._kernel_size, layer._stride, layer._padding, alpha
    )


def set_lora(layer, lora) -> None:
    """Let a layer add its LoRA layer's output: by its own code where it has some, else by a hook."""
    if hasattr(layer, "set_lora_layer"):
        if isinstance(layer, LoRACompatibleConv) and layer.lora_layer is None:
            layer.register_forward_pre_hook(without_foreign_scale)
        layer.set_lora_layer(lora)
        return
    has_hook = hasattr(layer, "lora_layer")
    layer.lora_layer = lora
    if not has_hook:
        layer.register_forward_post_hook(lambda layer, inputs, output: output + layer.lora_layer(inputs[0]))


def without_foreign_scale(layer, inputs):
    """The inputs of a convolution without the time embedding's scale, which residual blocks of ppdiffusers 0.29.0 pass
    in the place of LoRA's where they scale and shift by the time, as Kandinsky's decoder does."""
    return inputs[:1] if len(inputs) > 1 and isinstance(inputs[1], paddle.Tensor) else inputs


def is_target(name: str, target: str) -> bool:
    """Whether a layer's name is `target`, or ends in it as whole words."""
    return name == target or name.endswith(f".{target}")


def lora_layers(model) -> dict:
    """`{name of the layer: its LoRA layer}` of those that have one."""
    found = {name: getattr(layer, "lora_layer", None) for name, layer in model.named_sublayers()}
    return {name: lora for name, lora in found.items() if lora is not None}


@contextlib.contextmanager
def lora_switched_off(model):
    """A context manager that yields the model with its LoRA layers disabled: the base model, such as a teacher."""
    adapted = [
        (layer, layer.lora_layer) for layer in model.sublayers() if getattr(layer, "lora_layer", None) is not None
    ]
    for layer, _ in adapted:
        layer.lora_layer = None
    try:
        yield model
    finally:
        for layer, lora in adapted:
            layer.lora_layer = lora


def lora_parameters(model, **text_encoders) -> dict:
    """`{"<layer>.lora.down.weight": parameter, "<layer>.lora.up.weight": parameter}` as Paddle lays them out; layers of
    text encoders begin with the encoder's name."""
    return {
        f"{prefix}{layer}.lora.{part}.weight": getattr(lora, part).weight
        for prefix, model in by_prefix(model, text_encoders)
        for layer, lora in lora_layers(model).items()
        for part in ("down", "up")
    }


def trainable_parameters(model, **text_encoders) -> dict:
    """LoRA's parameters, and those that are trained in full beside them."""
    full = {
        f"{prefix}{name}": value
        for prefix, model in by_prefix(model, text_encoders)
        for name, value in full_parameters(model).items()
    }
    return {**lora_parameters(model, **text_encoders), **full}


def by_prefix(model, text_encoders: dict) -> list:
    """[(prefix of its parameters' names, model)]."""
    return [("", model), *((f"{name}.", encoder) for name, encoder in text_encoders.items())]


def full_parameters(model) -> dict:
    """{name: parameter} of the trainable parameters outside of LoRA layers."""
    return {n: value for n, value in model.named_parameters() if not value.stop_gradient and not is_lora(n)}


def save_lora(model, directory, save_format: str, **text_encoders) -> None:
    """Write LoRA layers into a file that the library `save_format` loads: `unet.load_attn_procs(directory)`, or with
    layers of text encoders, given by name, or of SD3's transformer, `pipeline.load_lora_weights(directory)`.

    Parameters that are trained in full beside them go into a second file, in the same layout, under the model's names.
    """
    updates, full = {}, {}
    # Readers expect this name for whatever has `load_attn_procs`, Kandinsky's prior, too.
    own_name = "unet" if hasattr(model, "load_attn_procs") else "transformer"
    for model_name, part in {own_name: model, **text_encoders}.items():
        matrices = linear_weights(part)
        for name, parameter in full_parameters(part).items():
            transposed = save_format != "ppdiffusers" and name in matrices
            full[f"{model_name}.{name}"] = Converted(parameter, dtype_of(parameter), transposed)
        for name, lora in lora_layers(part).items():
            down, up = (weight.numpy() for weight in (lora.down.weight, lora.up.weight))
            matrices = (down.T, up.T) if down.ndim == 2 else (down, up)
            updates[f"{model_name}.{name}"] = Update(*matrices, lora.network_alpha)
    write_lora(Path(directory) / FILES[save_format], updates, save_format)
    if full:
        metadata = {"format": "pd" if save_format == "ppdiffusers" else "pt"}
        write_tensors(Path(directory) / FULL_FILE, full, metadata)


def save_lora_weights(model, directory, save_formats=("ppdiffusers",), **text_encoders) -> None:
    """What a checkpoint holds: the files to load for inference, and the parameters as they are, to resume from."""
    for library in save_formats:
        save_lora(model, directory, library, **text_encoders)
    parameters = trainable_parameters(model, **text_encoders)
    write_tensors(Path(directory) / PARAMETERS_FILE, parameters, {"format": "pd"})


def load_lora_weights(model, directory, **text_encoders) -> None:
    """Read the trainable parameters of a checkpoint, in place.

    Raises:
        UserError: it holds LoRA layers of another model, rank or choice of layers.
    """
    file = Path(directory) / PARAMETERS_FILE
    saved, own = open_tensors(file)[0], trainable_parameters(model, **text_encoders)
    require_same_shapes(saved, own, f"{file} is of another LoRA")
    set_tensors(own, saved)


def initialize_lora(path, model, targets: str, log, **text_encoders) -> str:
    """Start a run's LoRA layers, and what it trains in full beside them, from a file, so that they compute the same.

    Args:
        path: the file or its folder. targets: `--lora_target_modules`. log: prints a line.
    Returns:
        a hash of the file.
    Raises:
        UserError: it cannot be read, is of another model, or holds more than the run trains.
    """
    source = LoRASource(path, "--init_lora", model, text_encoders)
    models = {"": model, **text_encoders}
    layers = {name: lora_layers(part) for name, part in models.items()}
    initialize(source, layers, {name: full_parameters(part) for name, part in models.items()}, targets, log)
    return source.digest()


@paddle.no_grad()
def load_lora(model, path, **text_encoders) -> None:
    """Load a LoRA, and the parameters that were trained in full beside it, into the models of a pipeline.

    It reads all that LoRA scripts write, and files of other trainers, into all families: `load_lora(pipe.unet, path)`,
    `pipe.prior_prior` or `pipe.transformer`. The pipelines' own methods of ppdiffusers 0.29.0 do not read the second
    file; `StableDiffusion3Pipeline.load_lora_weights` works only with `USE_PEFT_BACKEND=True` in the environment, and
    then fails with Paddle 3, whose `ParameterDict` has no `keys`.

    Args:
        path: a result, a checkpoint, or a file.
        text_encoders: `text_encoder=pipe.text_encoder` if it has layers there.
    Raises:
        UserError: it cannot be read, or has layers that the models do not have.
    """
    source = LoRASource(path, "load_lora", model, text_encoders)
    chosen = {}
    for component, updates in source.by_model().items():
        if component not in source.models:
            raise source.error(f"has layers of {component}; expected {component}=pipe.{component}, too")
        own = dict(source.models[component].named_sublayers())
        for name, update in updates.items():
            if name not in own or not isinstance(own[name], (paddle.nn.Linear, paddle.nn.Conv2D)):
                raise source.error(f"has the layer {name}, which this model does not have")
            lora = new_lora(own[name], update.rank)
            set_values(source, name, lora, update, update.rank)
            chosen[component, name] = own[name], lora
    for layer, lora in chosen.values():
        set_lora(layer, lora)
    for component, arrays in source.full().items():
        own = source.models[component].state_dict()
        for name, array in arrays.items():
            own[name].set_value(array.astype(dtype_of(own[name])))


def allow_text_encoder_lora() -> None:
    """Let `pipeline.load_lora_weights` of ppdiffusers 0.29.0 load LoRA layers of text encoders.

    The code for it is there and works, but calls `deprecate` first, which raises since version 0.25.
    """
    loaders = sys.modules["ppdiffusers.loaders.lora"]
    deprecate = loaders.deprecate

    def only_other_functions(*args, **options):
        if args[0] not in ("_modify_text_encoder", "_remove_text_encoder_monkey_patch_classmethod"):
            deprecate(*args, **options)

    loaders.deprecate = only_other_functions
