"""The student of a latent consistency distillation: its teacher's UNet, which is told its guidance, too."""

import contextlib

import numpy as np
import paddle
from ppdiffusers import LCMScheduler

from ppdiffusers_train.draws import generator
from ppdiffusers_train.models.drawing import beside, draw
from ppdiffusers_train.objectives.consistency import guidance_embedding

STEPS_SHOWN, TEACHER_SCALE = (1, 2, 4, 8), 7.5


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
            initial = generator(seed, 0, f"student {name}").uniform(-1, 1, tensor.shape)
            tensor.set_value(np.float32(initial / channels**0.5))
    return student


class TeacherAndStudent:
    """The networks of a distillation: `unet` is the student, `unet_target` its average, `teacher` stays as it is."""

    student_scale = 1.0
    """The guidance, as pipelines count it, at which a user draws with the student."""

    def teacher_unet(self):
        """A context in which it gives the teacher."""
        return contextlib.nullcontext(self.teacher)

    def teacher_predicts(self, noisy, timesteps, condition):
        """The teacher's prediction [B, C, h, w]; `condition`: named arguments of the UNet."""
        with self.teacher_unet() as teacher:
            return teacher(noisy, timesteps, **condition).sample

    def with_guidance(self, unet, noisy, timesteps, condition, guidance):
        """A student's prediction [B, C, h, w], where it is told its guidance [B]."""
        embedding = guidance_embedding(guidance, unet.config.time_cond_proj_dim)
        return unet(noisy, timesteps, timestep_cond=embedding, **condition).sample

    def draw_strips(self, prompts, seeds, resolution: int, teacher_steps: int) -> list:
        """For each prompt and seed the student's pictures of 1, 2, 4 and 8 steps beside the teacher's of many.

        It takes the module's `folder` of the teacher's pipeline, `encoders`, and `scheduler` of training.
        """
        parts = {name: getattr(self, name) for name in self.encoders}  # a cache has freed them; the folder loads those
        scheduler = LCMScheduler.from_config(self.scheduler.config)
        student = self.folder.pipeline(unet=self.unet_target, scheduler=scheduler, **parts)
        columns = [
            draw(student, prompts, seeds, resolution, steps, guidance_scale=self.student_scale) for steps in STEPS_SHOWN
        ]
        with self.teacher_unet() as unet:
            teacher = self.folder.pipeline(unet=unet, **parts)
            columns.append(draw(teacher, prompts, seeds, resolution, teacher_steps, guidance_scale=TEACHER_SCALE))
        return [beside(strip) for strip in zip(*columns)]
