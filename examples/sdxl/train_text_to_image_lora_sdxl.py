"""Fine-tune Stable Diffusion XL with LoRA: the result is a small file, and the pipeline stays as it is.

    python -u train_text_to_image_lora_sdxl.py --pretrained_model_name_or_path sdxl --train_data_dir photos \\
        --output_dir my-lora

The result is loaded by `pipe.load_lora_weights("my-lora")`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from train_text_to_image_sdxl import SDXLTrainingModule
from train_text_to_image_sdxl import build_parser as build_full_parser

from ppdiffusers_train.job import LoRATraining, job_main
from ppdiffusers_train.models.lora import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS
from ppdiffusers_train.models.recompute import enable_recompute


def build_parser():
    parser = build_full_parser(__doc__, arguments.SAVE_FORMATS)
    group = arguments.add_lora_arguments(parser, ATTENTION_TARGETS, output_dir="sd-model-finetuned-lora")
    arguments.add_text_encoder_arguments(group)
    return parser


class SDXLLoRATrainingModule(LoRATraining, SDXLTrainingModule):
    """Trains LoRA layers on the UNet's attention and, if asked for, on that of the text encoders."""

    def __init__(self, args):
        super().__init__(args)
        if args.train_text_encoder:
            self.encoders = ("vae",)
            self.adapted = {name: getattr(self, name) for name in ("text_encoder", "text_encoder_2")}
            for encoder in self.adapted.values():
                self.add_lora(encoder, TEXT_ENCODER_TARGETS)
                if args.gradient_checkpointing:
                    enable_recompute(encoder)

    def forward(self, encoded, draws):
        if self.adapted:
            encoded = {**encoded, **self.encode_tokens(encoded)}
        return super().forward(encoded, draws)


main = job_main(build_parser, SDXLLoRATrainingModule)

if __name__ == "__main__":
    main()
