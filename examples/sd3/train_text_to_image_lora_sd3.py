"""Fine-tune Stable Diffusion 3 with LoRA: the result is a small file, and the pipeline stays as it is.

    python -u train_text_to_image_lora_sd3.py --pretrained_model_name_or_path sd3 --train_data_dir photos \\
        --output_dir my-lora

The result is loaded by `load_lora(pipe.transformer, "my-lora")` of `ppdiffusers_train.models.lora`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from train_text_to_image_sd3 import SD3TrainingModule
from train_text_to_image_sd3 import build_parser as build_full_parser

from ppdiffusers_train.job import LoRATraining, job_main
from ppdiffusers_train.models.lora import JOINT_ATTENTION_TARGETS


def build_parser():
    parser = build_full_parser(__doc__, arguments.SAVE_FORMATS)
    arguments.add_lora_arguments(parser, JOINT_ATTENTION_TARGETS, output_dir="sd3-model-finetuned-lora")
    return parser


class SD3LoRATrainingModule(LoRATraining, SD3TrainingModule):
    """Trains LoRA layers on the transformer's attention."""


main = job_main(build_parser, SD3LoRATrainingModule)

if __name__ == "__main__":
    main()
