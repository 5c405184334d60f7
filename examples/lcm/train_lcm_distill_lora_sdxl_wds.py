"""Distill Stable Diffusion XL into LoRA layers with which its fine-tunes generate images in few steps.

    python -u train_lcm_distill_lora_sdxl_wds.py --pretrained_teacher_model sdxl --train_data_dir photos --output_dir x

The result is loaded by `pipe.load_lora_weights("x")`, for `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

from train_lcm_distill_lora_sd_wds import LCMLoRATrainingModule
from train_lcm_distill_lora_sd_wds import build_parser as build_lora_parser
from train_lcm_distill_sdxl_wds import LCMSDXLTrainingModule, add_sdxl_arguments

from ppdiffusers_train.job import job_main


def build_parser():
    return add_sdxl_arguments(build_lora_parser(__doc__))


class LCMLoRASDXLTrainingModule(LCMLoRATrainingModule, LCMSDXLTrainingModule):
    """LoRA layers as for Stable Diffusion, with SDXL's conditioning."""


main = job_main(build_parser, LCMLoRASDXLTrainingModule)

if __name__ == "__main__":
    main()
