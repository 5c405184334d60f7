"""Fine-tune the decoder of Kandinsky 2.2 with LoRA: the result is a small file, and the decoder stays as it is.

    python -u train_text_to_image_decoder_lora.py --train_data_dir photos --learning_rate 1e-4 --output_dir my-lora

The result is loaded by `pipe.unet.load_attn_procs("my-lora")`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from train_text_to_image_decoder import KandinskyDecoderTrainingModule
from train_text_to_image_decoder import build_parser as build_full_parser

from ppdiffusers_train.job import LoRATraining, run_job
from ppdiffusers_train.models.lora import ADDED_ATTENTION_TARGETS


def build_parser():
    parser = build_full_parser(__doc__)
    arguments.add_kandinsky_lora_arguments(parser, ADDED_ATTENTION_TARGETS)
    return parser


class KandinskyDecoderLoRATrainingModule(LoRATraining, KandinskyDecoderTrainingModule):
    """Trains LoRA layers on the decoder's attention."""


def main(argv=None):
    run_job(build_parser(), KandinskyDecoderLoRATrainingModule, argv)


if __name__ == "__main__":
    main()
