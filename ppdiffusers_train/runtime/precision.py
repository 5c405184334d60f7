"""Mixed precision through `paddle.amp`: O1 keeps float32 parameters, O2 has low-precision ones with float32 masters.

Run in emulated 16-bit precision (`tests/device`), not on a GPU; on CPUs Paddle computes in float32 whatever it is
asked for.
"""

import contextlib

import paddle

from ppdiffusers_train.module import is_lora
from ppdiffusers_train.runtime.loss_scale import LossScale

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


class Precision:
    """The arithmetic of a run.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        level: "O1" or "O2", of the models that are trained.
    """

    def __init__(self, mixed_precision: str, level: str = "O1"):
        self.mixed_precision, self.level = mixed_precision, level
        self.enabled = mixed_precision != "no" and computes_in_low_precision()
        # float16 alone needs its loss scaled: bfloat16 has float32's range.
        self.loss_scale = LossScale(self.enabled and mixed_precision == "fp16")

    @property
    def notice(self):
        """What has to be said about the choice, or None."""
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
        """Give weights the low-precision dtype: those of frozen models, and under O2 those that are trained.

        What is written to files keeps its type and value. So in a model without LoRA, which is written whole, all that
        is not trained (parameters and buffers) stays as it is, and the optimizer's float32 masters are the weights as
        they were before. The base of a LoRA is never written; its LoRA layers stay float32.
        """
        if not self.enabled:
            return
        dtype = DTYPES[self.mixed_precision]
        for name, model in module.named_children():
            if is_trained_without_lora(model):
                if self.level == "O2":
                    cast_trained(model, optimizer, dtype)
            elif not keeps_float32(module, name, self.mixed_precision):
                cast_frozen(model, dtype)


def keeps_float32(module, name: str, mixed_precision: str) -> bool:
    """Whether the weights of a module's frozen model stay float32 in this precision."""
    kept = module.keep_float32 + (module.keep_float32_in_fp16 if mixed_precision == "fp16" else ())
    return name in kept or getattr(getattr(module, name), "keeps_float32", False)


def cast_trained(model, optimizer, dtype: str) -> None:
    """Cast what is trained in a model, and give the optimizer the float32 weights as masters.

    Paddle makes masters of its own at the first step, from weights that were rounded by then; it keeps those that it
    finds. A sharded optimizer (ZeRO) has the masters of its own share alone.
    """
    originals = float32_storage(model)
    paddle.amp.decorate(model, optimizer, level="O2", dtype=dtype, master_weight=True)
    own = {parameter.name for parameter in updated_parameters(optimizer)}
    for tensor, original in originals:
        if tensor.stop_gradient:
            share_storage(tensor, original)
        elif tensor.dtype != paddle.float32 and tensor.name in own:
            original.name = f"{tensor.name}_fp32_master_0"  # Paddle's name for it, on which its moments' names build
            optimizer._master_weights[tensor.name] = original


def cast_frozen(model, dtype: str) -> None:
    """Cast a model that is not trained, or the base of a LoRA, but for the layers in it that are trained, statistics
    (see `trainable.keep_frozen`) and buffers."""
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
    """(tensor, another one with its storage) of all float32 parameters and buffers of a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(tensor, same_storage(tensor)) for tensor in tensors if tensor.dtype == paddle.float32]


def updated_parameters(optimizer) -> list:
    """The parameters that an optimizer updates on this rank."""
    return getattr(optimizer, "_inner_opt", optimizer)._parameter_list


@contextlib.contextmanager
def holding(pairs):
    """Within, each parameter of (parameter, tensor) has the tensor's storage and type; nothing is copied.

    For files, averages and images. Paddle's way to write masters (`save_dtype`) hangs hooks on layers that models
    share, such as ppdiffusers' activations, and so changes every model of the process.
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
    """Another tensor with the storage of this one, which keeps it when this one gets another."""
    other = paddle.empty([0], tensor.dtype)
    share_storage(other, tensor)
    return other


def share_storage(tensor, other) -> None:
    """Make a tensor hold another one's storage, shape and type; it stays the same object."""
    tensor.value().get_tensor()._share_data_with(other.value().get_tensor())


def computes_in_low_precision() -> bool:
    """Whether `paddle.amp` does anything on this device."""
    return not paddle.get_device().startswith("cpu")


def is_trained_itself(layer) -> bool:
    """Whether a layer has trainable parameters of its own, not of its sublayers."""
    return any(not parameter.stop_gradient for parameter in layer.parameters(include_sublayers=False))


def is_trained_without_lora(model) -> bool:
    """Whether something in a model is trained, and none of it is LoRA: the model is then written whole."""
    names = [name for name, parameter in model.named_parameters() if not parameter.stop_gradient]
    return bool(names) and not any(map(is_lora, names))


def set_tf32(allowed: bool) -> bool:
    """Switch TF32 in matrix products and convolutions: Paddle has it on unless told otherwise. Returns whether the
    device has it. Not run on a GPU."""
    from paddle.base import core

    if not paddle.get_device().startswith("gpu"):
        return False
    core.set_cublas_switch(allowed)
    core.set_cudnn_switch(allowed)
    return True


def set_deterministic() -> bool:
    """Ask Paddle for kernels that add in the same order every time; returns whether the device has others. Not run on
    a GPU."""
    if not paddle.get_device().startswith("gpu"):
        return False
    paddle.set_flags({"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1})
    return True
