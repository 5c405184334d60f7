"""Fine-tune Stable Diffusion 1.x or 2.x with LoRA: the result is a small file, and the pipeline stays as it is.

    python -u train_text_to_image_lora.py --pretrained_model_name_or_path sd --train_data_dir photos \\
        --output_dir my-lora

The result is loaded by `pipe.load_lora_weights("my-lora")`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from train_text_to_image import SDTrainingModule
from train_text_to_image import build_parser as build_full_parser

from ppdiffusers_train.job import LoRATraining, job_main
from ppdiffusers_train.models.lora import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS
from ppdiffusers_train.models.masks import encode_masks
from ppdiffusers_train.models.stable_diffusion import encode_images


def build_parser():
    parser = build_full_parser(__doc__, arguments.SAVE_FORMATS)
    defaults = {"output_dir": "sd-model-finetuned-lora", "validation_epochs": 1}
    group = arguments.add_lora_arguments(parser, ATTENTION_TARGETS, **defaults)
    arguments.add_text_encoder_arguments(group)
    return parser


class SDLoRATrainingModule(LoRATraining, SDTrainingModule):
    """Trains LoRA layers on the UNet's attention and, if asked for, on that of the text encoder."""

    def __init__(self, args):
        super().__init__(args)
        if args.train_text_encoder:
            self.encoders = ("vae",)
            self.adapted = {"text_encoder": self.text_encoder}
            self.add_lora(self.text_encoder, TEXT_ENCODER_TARGETS)

    def encode(self, batch):
        """latents [B, 4, h, w], scaled; prompt_embeds [B, L, D] or, where the text encoder is trained, input_ids."""
        if not self.adapted:
            return super().encode(batch)
        latents = encode_images(self.vae, batch["pixel_values"])
        return {"latents": latents, "input_ids": batch["input_ids"], **encode_masks(batch, latents)}

    def forward(self, encoded, draws):
        if self.adapted:
            encoded = {**encoded, "prompt_embeds": self.encode_prompt(encoded["input_ids"])}
        return super().forward(encoded, draws)


main = job_main(build_parser, SDLoRATrainingModule)

if __name__ == "__main__":
    main()
