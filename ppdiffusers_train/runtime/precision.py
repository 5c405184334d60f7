"""Mixed precision through `paddle.amp`: float32 parameters, low-precision arithmetic (level O1)."""

import paddle

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


class Precision:
    """The arithmetic of a run.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
    """

    def __init__(self, mixed_precision: str):
        self.mixed_precision = mixed_precision
        self.enabled = mixed_precision != "no" and not paddle.get_device().startswith("cpu")
        # float16 alone needs its loss scaled: bfloat16 has float32's range.
        self.scaler = paddle.amp.GradScaler(enable=self.enabled and mixed_precision == "fp16")

    @property
    def notice(self):
        """What has to be said about the choice, or None."""
        if self.mixed_precision != "no" and not self.enabled:
            return f"--mixed_precision {self.mixed_precision}: no effect on a CPU, training in float32"
        return None

    def autocast(self):
        """The context in which the loss is computed."""
        return paddle.amp.auto_cast(enable=self.enabled, level="O1", dtype=DTYPES.get(self.mixed_precision, "float16"))


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
