"""The student of a latent consistency distillation: its teacher's UNet, which is told its guidance, too."""

import numpy as np
import paddle

from ppdiffusers_train.draws import generator


@paddle.no_grad()
def build_student(teacher, channels: int, seed: int):
    """A UNet with the teacher's weights and, where the teacher has none, a projection of `channels` numbers that stand
    for the guidance. The projection starts uniform in ±1/√channels, as a function of the seed."""
    channels = teacher.config.time_cond_proj_dim or channels
    config = {**teacher.config, "time_cond_proj_dim": channels}
    config.pop("_use_default_values", None)  # it names what the teacher's file left out, and such keys are not read
    student = type(teacher).from_config(config)
    own, weights = student.state_dict(), teacher.state_dict()
    for name, tensor in own.items():
        if name in weights:
            tensor.set_value(weights[name])
        else:
            draw = generator(seed, 0, f"student {name}").uniform(-1, 1, tensor.shape)
            tensor.set_value(np.float32(draw / channels**0.5))
    return student
