"""Mixed precision through `paddle.amp`: O1 keeps float32 parameters, O2 has low-precision ones with float32 masters.

Tested in emulated 16-bit precision (`tests/device`), not on a GPU. On CPUs Paddle always computes in float32.
"""

import contextlib

import paddle

from ppdiffusers_train.module import is_lora
from ppdiffusers_train.runtime.loss_scale import LossScale

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


class Precision:
    """The precision of a run.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        level: "O1" or "O2", for the trained models.
    """

    def __init__(self, mixed_precision: str, level: str = "O1"):
        self.mixed_precision, self.level = mixed_precision, level
        self.enabled = mixed_precision != "no" and computes_in_low_precision()
        # Only float16 needs loss scaling: bfloat16 has the range of float32.
        self.loss_scale = LossScale(self.enabled and mixed_precision == "fp16")

    @property
    def notice(self):
        """A line to log if the flags have no effect, or None."""
        if self.mixed_precision != "no" and not self.enabled:
            return f"--mixed_precision {self.mixed_precision}: no effect on a CPU, training in float32"
        if self.mixed_precision == "no" and self.level == "O2":
            return "--amp_level O2: no effect without --mixed_precision fp16 or bf16"
        return None

    def autocast(self):
        """The context in which samples are encoded, the loss is computed, and validation images are generated."""
        level, dtype = self.level, DTYPES.get(self.mixed_precision, "float16")
        return paddle.amp.auto_cast(enable=self.enabled, level=level, dtype=dtype)

    def cast_models(self, module, optimizer) -> None:
        """Cast weights to the low-precision dtype: those of frozen models, and under O2 those that are trained.

        Weights that are written to files keep their dtype and value. So in a model without LoRA, all of which is saved,
        frozen parameters and buffers are not cast, and the optimizer's float32 masters are the weights before the cast.
        The base model of a LoRA is never saved, so it is cast; its LoRA layers stay float32.
        """
        if not self.enabled:
            return
        dtype = DTYPES[self.mixed_precision]
        for name, model in module.named_children():
            if is_trained_without_lora(model):
                if self.level == "O2" and not getattr(model, "keeps_float32", False):
                    cast_trained(model, optimizer, dtype)
            else:
                self.cast_encoder(module, name)

    def cast_encoder(self, module, name: str) -> None:
        """Cast a frozen model to the low-precision dtype, unless it keeps float32."""
        if self.enabled and not keeps_float32(module, name, self.mixed_precision):
            cast_frozen(getattr(module, name), DTYPES[self.mixed_precision])


def keeps_float32(module, name: str, mixed_precision: str) -> bool:
    """Whether the weights of a module's frozen model stay float32 in this mixed precision."""
    kept = module.keep_float32 + (module.keep_float32_in_fp16 if mixed_precision == "fp16" else ())
    return name in kept or getattr(getattr(module, name), "keeps_float32", False)


def cast_trained(model, optimizer, dtype: str) -> None:
    """Cast the trainable parameters of a model, and make their float32 values the optimizer's masters.

    Paddle would create masters at the first step, from weights that are rounded by then; it keeps masters that exist. A
    sharded optimizer (ZeRO) has only the masters of its own shard.
    """
    originals = float32_storage(model)
    paddle.amp.decorate(model, optimizer, level="O2", dtype=dtype, master_weight=True)
    own = {parameter.name for parameter in updated_parameters(optimizer)}
    for tensor, original in originals:
        if tensor.stop_gradient:
            share_storage(tensor, original)
        elif tensor.dtype != paddle.float32 and tensor.name in own:
            original.name = (
                f"{tensor.name}_fp32_master_0"  # Paddle's name for it, from which the names of its moments are derived
            )
            optimizer._master_weights[tensor.name] = original


def cast_frozen(model, dtype: str) -> None:
    """Cast a frozen model or the base model of a LoRA, except trained layers, parameters that `module.keep_frozen` got,
    and buffers."""
    kept = [
        (tensor, original)
        for tensor, original in float32_storage(model)
        if getattr(tensor, "stays_frozen", False) or not isinstance(tensor, paddle.base.framework.EagerParamBase)
    ]
    trained = [layer for layer in model.sublayers(include_self=True) if is_trained_itself(layer)]
    paddle.amp.decorate(model, level="O2", dtype=dtype, excluded_layers=trained or None)
    for tensor, original in kept:
        share_storage(tensor, original)


def float32_storage(model) -> list:
    """(tensor, another tensor with the same storage) of all float32 parameters and buffers of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(tensor, same_storage(tensor)) for tensor in tensors if tensor.dtype == paddle.float32]


def updated_parameters(optimizer) -> list:
    """The parameters that an optimizer updates on this rank."""
    return getattr(optimizer, "_inner_opt", optimizer)._parameter_list


@contextlib.contextmanager
def holding(pairs):
    """A context in which each parameter of the (parameter, tensor) pairs has the tensor's storage and dtype, without a
    copy.

    For writing files, averages and generating images. Paddle's way to save masters (`save_dtype`) registers hooks on
    layers that models share, such as ppdiffusers' activations, and so changes every model of the process.
    """
    held = []
    for parameter, tensor in pairs:
        held.append((parameter, same_storage(parameter)))
        share_storage(parameter, tensor)
    try:
        yield
    finally:
        for parameter, own in held:
            share_storage(parameter, own)


def same_storage(tensor):
    """Another tensor with the storage of this one. It keeps that storage when this tensor gets another."""
    other = paddle.empty([0], tensor.dtype)
    share_storage(other, tensor)
    return other


def share_storage(tensor, other) -> None:
    """Make a tensor use another one's storage, shape and dtype; it stays the same object."""
    tensor.value().get_tensor()._share_data_with(other.value().get_tensor())


def computes_in_low_precision() -> bool:
    """Whether `paddle.amp` has an effect on this device."""
    return not paddle.get_device().startswith("cpu")


def is_trained_itself(layer) -> bool:
    """Whether a layer itself has trainable parameters, apart from its sublayers."""
    return any(not parameter.stop_gradient for parameter in layer.parameters(include_sublayers=False))


def is_trained_without_lora(model) -> bool:
    """Whether a model has trainable parameters and none of them is LoRA: then all of the model is saved."""
    names = [name for name, parameter in model.named_parameters() if not parameter.stop_gradient]
    return bool(names) and not any(map(is_lora, names))


def set_tf32(allowed: bool) -> bool:
    """Switch TF32 in matrix products and convolutions, which is on by default in Paddle. Returns whether the device is
    a GPU. Not tested on a GPU."""
    from paddle.base import core

    if not paddle.get_device().startswith("gpu"):
        return False
    core.set_cublas_switch(allowed)
    core.set_cudnn_switch(allowed)
    return True


def set_deterministic() -> bool:
    """Switch to deterministic kernels. Returns whether the device is a GPU; CPU kernels are deterministic anyway. Not
    tested on a GPU."""
    if not paddle.get_device().startswith("gpu"):
        return False
    paddle.set_flags({"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1})
    return True
