"""Fine-tune Stable Diffusion 3 with LoRA: a small file of updates, the pipeline itself stays as it is.

    python -u train_text_to_image_lora_sd3.py --pretrained_model_name_or_path sd3 --train_data_dir photos \\
        --output_dir my-lora

The result is loaded by `load_lora(pipe.transformer, "my-lora")` of `ppdiffusers_train.models.lora`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import sys
from pathlib import Path

from ppdiffusers_train.arguments import add_lora_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.rows import warn_of_small_images
from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.models.lora import add_lora, load_lora_weights, save_lora, save_lora_weights
from ppdiffusers_train.training import check_run, launch_training_task

sys.path.append(str(Path(__file__).parent))  # where this file is imported, not run
from train_text_to_image_sd3 import SD3TrainingModule  # noqa: E402
from train_text_to_image_sd3 import build_parser as build_full_parser  # noqa: E402

TARGETS = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj"  # of both streams, the image's and the text's


def build_parser():
    parser = build_full_parser()
    parser.description = __doc__.splitlines()[0]
    add_lora_arguments(parser, TARGETS)
    parser.set_defaults(output_dir="sd3-model-finetuned-lora")
    return parser


class SD3LoRATrainingModule(SD3TrainingModule):
    """LoRA layers on the transformer's attention."""

    def __init__(self, args):
        super().__init__(args)
        options = (args.lora_rank, args.lora_alpha, args.lora_dropout, args.seed or 0)
        add_lora(self.transformer, args.lora_target_modules, *options)

    def save_weights(self, directory):
        save_lora_weights(self.transformer, directory)

    def load_weights(self, directory):
        load_lora_weights(self.transformer, directory)

    def save_pretrained(self, directory):
        save_lora(self.transformer, directory, self.args.save_format)

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": [*card["tags"], "lora"]}


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    warn_of_small_images(dataset, args.resolution)
    launch_training_task(SD3LoRATrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
