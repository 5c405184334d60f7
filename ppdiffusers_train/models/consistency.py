"""The student of a latent consistency distillation: its teacher's UNet, conditioned on the guidance scale as well."""

import contextlib

import numpy as np
import paddle
from ppdiffusers import LCMScheduler

from ppdiffusers_train.draws import generator
from ppdiffusers_train.models.generation import generate_images, side_by_side
from ppdiffusers_train.objectives.consistency import guidance_embedding

STEPS_SHOWN, TEACHER_SCALE = (1, 2, 4, 8), 7.5


@paddle.no_grad()
def build_student(teacher, channels: int, seed: int):
    """A UNet with the teacher's weights and, where the teacher has none, a projection of the guidance embedding of
    `channels` elements. The projection starts uniform in ±1/√channels, as a function of the seed."""
    channels = teacher.config.time_cond_proj_dim or channels
    config = {**teacher.config, "time_cond_proj_dim": channels}
    config.pop("_use_default_values", None)  # lists the keys that the teacher's file left out; those would be ignored
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
    """The guidance scale, as pipelines count it, at which a user generates images with the student."""

    def teacher_unet(self):
        """A context manager that yields the teacher."""
        return contextlib.nullcontext(self.teacher)

    def predict_with_teacher(self, noisy, timesteps, condition):
        """The teacher's prediction [B, C, h, w]; `condition`: named arguments of the UNet."""
        with self.teacher_unet() as teacher:
            return teacher(noisy, timesteps, **condition).sample

    def predict_with_student(self, unet, noisy, timesteps, condition, guidance):
        """A student's prediction [B, C, h, w], conditioned on its guidance [B]."""
        embedding = guidance_embedding(guidance, unet.config.time_cond_proj_dim)
        return unet(noisy, timesteps, timestep_cond=embedding, **condition).sample

    def generate_strips(self, prompts, seeds, resolution: int, teacher_steps: int) -> list:
        """For each prompt and seed the student's images after 1, 2, 4 and 8 steps, and then the teacher's.

        Uses the module's `folder` of the teacher's pipeline, its `encoders`, and the `scheduler` of training.

        Args:
            teacher_steps: inference steps of the teacher's image.
        """
        parts = {
            name: getattr(self, name) for name in self.encoders
        }  # None where a cache has freed them: then the folder loads them
        scheduler = LCMScheduler.from_config(self.scheduler.config)
        student = self.folder.pipeline(unet=self.unet_target, scheduler=scheduler, **parts)
        columns = [
            generate_images(student, prompts, seeds, resolution, steps, guidance_scale=self.student_scale)
            for steps in STEPS_SHOWN
        ]
        with self.teacher_unet() as unet:
            teacher = self.folder.pipeline(unet=unet, **parts)
            columns.append(
                generate_images(teacher, prompts, seeds, resolution, teacher_steps, guidance_scale=TEACHER_SCALE)
            )
        return [side_by_side(strip) for strip in zip(*columns)]
