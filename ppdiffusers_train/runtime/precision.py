"""Mixed precision through `paddle.amp`: O1 keeps float32 parameters, O2 has low ones with float32 masters. Not run on a
card; on CPUs Paddle computes in float32 whatever it is asked for."""

import contextlib

import paddle

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


class Precision:
    """The arithmetic of a run.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        level: "O1" or "O2", of the models that learn.
    """

    def __init__(self, mixed_precision: str, level: str = "O1"):
        self.mixed_precision, self.level = mixed_precision, level
        self.enabled = mixed_precision != "no" and computes_in_low_precision()
        # float16 alone needs its loss scaled: bfloat16 has float32's range.
        self.scaler = paddle.amp.GradScaler(enable=self.enabled and mixed_precision == "fp16")

    @property
    def notice(self):
        """What has to be said about the choice, or None."""
        if self.mixed_precision != "no" and not self.enabled:
            return f"--mixed_precision {self.mixed_precision}: no effect on a CPU, training in float32"
        if self.mixed_precision == "no" and self.level == "O2":
            return "--amp_level O2: no effect without --mixed_precision fp16 or bf16"
        return None

    def autocast(self):
        """The context in which the loss is computed, and pictures are drawn."""
        level, dtype = self.level, DTYPES.get(self.mixed_precision, "float16")
        return paddle.amp.auto_cast(enable=self.enabled, level=level, dtype=dtype)

    def lower(self, module, optimizer) -> None:
        """Give parameters the low type: those of frozen models, and under O2 of those that learn as a whole.

        The optimizer then keeps float32 masters of them. What stays in float32: adapters in a frozen model (LoRA), and
        models that `module.overflow_float16` names.
        """
        if not self.enabled:
            return
        dtype = DTYPES[self.mixed_precision]
        for name, model in module.named_children():
            if learns_as_a_whole(model):
                if self.level == "O2":
                    paddle.amp.decorate(model, optimizer, level="O2", dtype=dtype, master_weight=True)
            elif name not in module.always_float32 and (dtype == "bfloat16" or name not in module.overflow_float16):
                learning = [layer for layer in model.sublayers(include_self=True) if learns_itself(layer)]
                paddle.amp.decorate(model, level="O2", dtype=dtype, excluded_layers=learning or None)


@contextlib.contextmanager
def in_float32(parameters, masters: dict):
    """Within, parameters of a lower type are float32: the optimizer's masters themselves, or their own values.

    For files and averages. Paddle's way (`save_dtype`) hangs hooks on layers that models share, such as ppdiffusers'
    activations, and so changes every model of the process.

    Args:
        masters: `{parameter.name: float32 tensor}`.
    """
    held = []
    for parameter in parameters:
        if parameter.dtype != paddle.float32:
            low = paddle.empty([0])
            share_storage(low, parameter)
            held.append((parameter, low))
            share_storage(parameter, masters.get(parameter.name, parameter).astype("float32"))
    try:
        yield
    finally:
        for parameter, low in held:
            share_storage(parameter, low)


def share_storage(tensor, other) -> None:
    """Make a tensor hold another one's storage, shape and type; it stays the same object."""
    tensor.value().get_tensor()._share_data_with(other.value().get_tensor())


def computes_in_low_precision() -> bool:
    """Whether `paddle.amp` does anything on this device."""
    return not paddle.get_device().startswith("cpu")


def learns_itself(layer) -> bool:
    """Whether a layer has parameters of its own, not of its sublayers, that learn."""
    return any(not parameter.stop_gradient for parameter in layer.parameters(include_sublayers=False))


def learns_as_a_whole(model) -> bool:
    """Whether most of a model's numbers learn; of an adapted model only a few do."""
    sizes = [(parameter.size, not parameter.stop_gradient) for parameter in model.parameters()]
    return 2 * sum(size for size, learns in sizes if learns) > sum(size for size, _ in sizes)


def set_tf32(allowed: bool) -> bool:
    """Switch TF32 in matrix products and convolutions; returns whether the device has it. Not run on a card."""
    from paddle.base import core

    if not paddle.get_device().startswith("gpu"):
        return False
    core.set_cublas_switch(allowed)
    core.set_cudnn_switch(allowed)
    return True


def set_deterministic() -> bool:
    """Ask Paddle for kernels that add in the same order every time; returns whether the device has others. Not run on
    a card."""
    if not paddle.get_device().startswith("gpu"):
        return False
    paddle.set_flags({"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1})
    return True
