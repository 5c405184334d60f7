"""Fine-tune Stable Diffusion XL with LoRA: a small file of updates, the pipeline itself stays as it is.

    python -u train_text_to_image_lora_sdxl.py --pretrained_model_name_or_path sdxl --train_data_dir photos \\
        --output_dir my-lora

The result is loaded by `pipe.load_lora_weights("my-lora")`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import sys
from pathlib import Path

from ppdiffusers_train.arguments import Flag, add_lora_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.rows import warn_of_small_images
from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.models.lora import (
    ATTENTION_TARGETS,
    add_lora,
    load_lora_weights,
    save_lora,
    save_lora_weights,
)
from ppdiffusers_train.models.sdxl import encode_prompts
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.training import check_run, launch_training_task

sys.path.append(str(Path(__file__).parent))  # where this file is imported, not run
from train_text_to_image_sdxl import SDXLTrainingModule  # noqa: E402
from train_text_to_image_sdxl import build_parser as build_full_parser  # noqa: E402

TEXT_ENCODER_TARGETS = "q_proj,k_proj,v_proj,out_proj"


def build_parser():
    parser = build_full_parser()
    parser.description = __doc__.splitlines()[0]
    group = add_lora_arguments(parser, ATTENTION_TARGETS)
    group.add_argument("--train_text_encoder", action=Flag, help="LoRA layers on both text encoders, too")
    parser.set_defaults(output_dir="sd-model-finetuned-lora")
    return parser


class SDXLLoRATrainingModule(SDXLTrainingModule):
    """LoRA layers on the UNet's attention, and on that of the text encoders where it is asked for."""

    def __init__(self, args):
        super().__init__(args)
        options = (args.lora_rank, args.lora_alpha, args.lora_dropout, args.seed or 0)
        add_lora(self.unet, args.lora_target_modules, *options)
        self.adapted = {}  # text encoders that learn, by name
        if args.train_text_encoder:
            self.encoders = ("vae",)
            self.adapted = {name: getattr(self, name) for name in ("text_encoder", "text_encoder_2")}
            for encoder in self.adapted.values():
                add_lora(encoder, TEXT_ENCODER_TARGETS, *options)

    def encode(self, batch):
        """With text encoders that learn, captions stay token ids: input_ids, input_ids_2 [B, L]; has_prompt [B]."""
        if not self.adapted:
            return super().encode(batch)
        names = ("time_ids", "input_ids", "input_ids_2", "has_prompt")
        return {"latents": encode_images(self.vae, batch["pixel_values"]), **{name: batch[name] for name in names}}

    def forward(self, encoded, draws):
        if self.adapted:
            tokens = (encoded[name] for name in ("input_ids", "input_ids_2", "has_prompt"))
            embeds, pooled = encode_prompts(self.text_encoder, self.text_encoder_2, *tokens)
            encoded = {**encoded, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        return super().forward(encoded, draws)

    def save_weights(self, directory):
        save_lora_weights(self.unet, directory, **self.adapted)

    def load_weights(self, directory):
        load_lora_weights(self.unet, directory, **self.adapted)

    def save_pretrained(self, directory):
        save_lora(self.unet, directory, self.args.save_format, **self.adapted)

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": [*card["tags"], "lora"]}


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    warn_of_small_images(dataset, args.resolution)
    launch_training_task(SDXLLoRATrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
