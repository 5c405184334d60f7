"""Distill Stable Diffusion into LoRA layers that let any of its fine-tunes draw in a few steps.

    python -u train_lcm_distill_lora_sd_wds.py --pretrained_teacher_model sd --train_data_dir photos --output_dir lora

The result is loaded by `pipe.load_lora_weights("lora")`, for `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import sys
from pathlib import Path

from ppdiffusers import LCMScheduler

from ppdiffusers_train.arguments import add_lora_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import UserError, one_line_errors
from ppdiffusers_train.models.drawing import draw
from ppdiffusers_train.models.lora import (
    add_lora,
    load_lora_weights,
    lora_switched_off,
    save_lora,
    save_lora_weights,
)
from ppdiffusers_train.training import check_run, launch_training_task

sys.path.append(str(Path(__file__).parent))  # where this file is imported, not run
from train_lcm_distill_sd_wds import LCMTrainingModule, build_distillation_parser  # noqa: E402

TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,downsamplers.0.conv,"
    "upsamplers.0.conv,time_emb_proj"
)


def build_parser(doc=__doc__):
    parser = build_distillation_parser(doc)
    add_lora_arguments(parser, TARGETS, rank=64)
    return parser


class LCMLoRATrainingModule(LCMTrainingModule):
    """One UNet: with its LoRA layers it is the student, and without gradient the target; without them the teacher."""

    keep_float32 = ()

    def build_networks(self):
        args = self.args
        if args.trainable_modules:
            raise UserError("--trainable_modules: without LoRA, the model is the teacher; nothing else of it may learn")
        self.unet = self.folder.load("unet")
        alpha = args.lora_alpha or args.lora_rank
        add_lora(self.unet, args.lora_target_modules, args.lora_rank, alpha, args.lora_dropout, args.seed or 0)

    def student_predicts(self, noisy, timesteps, condition, guidance):
        return self.unet(noisy, timesteps, **condition).sample

    target_predicts = student_predicts

    def teacher_predicts(self, noisy, timesteps, condition):
        with lora_switched_off(self.unet):
            return self.unet(noisy, timesteps, **condition).sample

    def after_step(self):
        """The target is the student itself."""

    def draw_student(self, prompts, seeds, steps):
        """The LoRA's scheduler draws without guidance: its scale of 1 is what was distilled."""
        scheduler = LCMScheduler.from_config(self.scheduler.config)
        pipeline = self.folder.pipeline(vae=self.vae, unet=self.unet, scheduler=scheduler, **self.text_parts())
        return draw(pipeline, prompts, seeds, self.args.resolution, steps, guidance_scale=1.0)

    def teacher_unet(self):
        return self.unet

    def draw_teacher(self, prompts, seeds):
        with lora_switched_off(self.unet):
            return super().draw_teacher(prompts, seeds)

    def save_weights(self, directory):
        save_lora_weights(self.unet, directory)

    def load_weights(self, directory):
        load_lora_weights(self.unet, directory)

    def save_pretrained(self, directory):
        for library in ("ppdiffusers", "diffusers", "kohya"):
            save_lora(self.unet, directory, library)

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": [*card["tags"], "lora"]}


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    launch_training_task(LCMLoRATrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
