"""Distill Stable Diffusion XL into LoRA layers that let any of its fine-tunes draw in a few steps.

    python -u train_lcm_distill_lora_sdxl_wds.py --pretrained_teacher_model sdxl --train_data_dir photos --output_dir x

The result is loaded by `pipe.load_lora_weights("x")`, for `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import sys
from pathlib import Path

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.training import check_run, launch_training_task

sys.path.append(str(Path(__file__).parent))  # where this file is imported, not run
from train_lcm_distill_lora_sd_wds import LCMLoRATrainingModule  # noqa: E402
from train_lcm_distill_lora_sd_wds import build_parser as build_lora_parser  # noqa: E402
from train_lcm_distill_sdxl_wds import LCMSDXLTrainingModule, add_sdxl_arguments  # noqa: E402


def build_parser():
    return add_sdxl_arguments(build_lora_parser(__doc__))


class LCMLoRASDXLTrainingModule(LCMLoRATrainingModule, LCMSDXLTrainingModule):
    """The LoRA of the one, the conditions of the other."""


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    launch_training_task(LCMLoRASDXLTrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
