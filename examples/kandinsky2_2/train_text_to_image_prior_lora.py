"""Fine-tune the prior of Kandinsky 2.2 with LoRA: the result is a small file, and the prior stays as it is.

    python -u train_text_to_image_prior_lora.py --train_data_dir photos --learning_rate 1e-4 --output_dir my-lora

The result is loaded by `pipe.prior_prior.load_attn_procs("my-lora")`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from train_text_to_image_prior import KandinskyPriorTrainingModule
from train_text_to_image_prior import build_parser as build_full_parser

from ppdiffusers_train.job import LoRATraining, job_main
from ppdiffusers_train.models.lora import ATTENTION_TARGETS


def build_parser():
    return arguments.add_kandinsky_lora_arguments(build_full_parser(__doc__), ATTENTION_TARGETS)


class KandinskyPriorLoRATrainingModule(LoRATraining, KandinskyPriorTrainingModule):
    """Trains LoRA layers on the prior's attention."""


main = job_main(build_parser, KandinskyPriorLoRATrainingModule)

if __name__ == "__main__":
    main()
