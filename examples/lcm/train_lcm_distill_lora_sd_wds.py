"""Distill Stable Diffusion into LoRA layers with which its fine-tunes generate images in a few steps.

    python -u train_lcm_distill_lora_sd_wds.py --pretrained_teacher_model sd --train_data_dir photos --output_dir lora

The result is loaded by `pipe.load_lora_weights("lora")`, for `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from train_lcm_distill_sd_wds import LCMTrainingModule
from train_lcm_distill_sd_wds import build_parser as build_full_parser

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.job import LoRATraining, job_main
from ppdiffusers_train.models.lora import UNET_TARGETS, lora_switched_off


def build_parser(doc=__doc__):
    parser = build_full_parser(doc, has_student=False)
    arguments.add_lora_arguments(parser, UNET_TARGETS, rank=64)
    return parser


class LCMLoRATrainingModule(LoRATraining, LCMTrainingModule):
    """One UNet: with LoRA layers it is the student and, without gradient, the target; without them the teacher."""

    lora_formats = ("ppdiffusers", "diffusers", "kohya")
    keep_float32 = ()

    def build_networks(self):
        if self.args.trainable_modules:
            raise UserError(
                "--trainable_modules: without LoRA, the model is the teacher; only LoRA layers can be trained"
            )
        if self.args.cast_teacher_unet:
            print("--cast_teacher_unet: no effect, the teacher has the weights of the student's base")
        self.unet = self.folder.load("unet")

    @property
    def unet_target(self):
        return self.unet

    def teacher_unet(self):
        return lora_switched_off(self.unet)

    def predict_with_student(self, unet, noisy, timesteps, condition, guidance):
        return unet(noisy, timesteps, **condition).sample  # guidance is distilled into it, and is no input

    def after_step(self):
        """The target is the student itself."""


main = job_main(build_parser, LCMLoRATrainingModule)

if __name__ == "__main__":
    main()
