"""Fine-tune the prior of Kandinsky 2.2 with LoRA: a small file of updates, the prior itself stays as it is.

    python -u train_text_to_image_prior_lora.py --train_data_dir photos --learning_rate 1e-4 --output_dir my-lora

The result is loaded by `pipe.prior_prior.load_attn_procs("my-lora")`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import sys
from pathlib import Path

from ppdiffusers_train.arguments import add_lora_arguments
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.models.lora import ATTENTION_TARGETS, add_lora, load_lora_weights, save_lora, save_lora_weights
from ppdiffusers_train.models.text import warn_of_long_captions
from ppdiffusers_train.training import check_run, launch_training_task

sys.path.append(str(Path(__file__).parent))  # where this file is imported, not run
from train_text_to_image_prior import KandinskyPriorTrainingModule  # noqa: E402
from train_text_to_image_prior import build_parser as build_full_parser  # noqa: E402


def build_parser():
    parser = build_full_parser()
    parser.description = __doc__.splitlines()[0]
    add_lora_arguments(parser, ATTENTION_TARGETS)
    parser.set_defaults(output_dir="kandi_2_2-model-finetuned-lora", num_validation_images=4, validation_epochs=1)
    return parser


class KandinskyPriorLoRATrainingModule(KandinskyPriorTrainingModule):
    """LoRA layers on the prior's attention learn what the full prior would."""

    def __init__(self, args):
        super().__init__(args)
        rank, alpha, seed = args.lora_rank, args.lora_alpha, args.seed or 0
        add_lora(self.prior, args.lora_target_modules, rank, alpha, args.lora_dropout, seed)

    def save_weights(self, directory):
        save_lora_weights(self.prior, directory)

    def load_weights(self, directory):
        load_lora_weights(self.prior, directory)

    def save_pretrained(self, directory):
        save_lora(self.prior, directory, self.args.save_format)

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": [*card["tags"], "lora"]}


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    module = KandinskyPriorLoRATrainingModule(args)
    warn_of_long_captions(module.tokenizer, dataset)
    launch_training_task(module, dataset, args)


if __name__ == "__main__":
    main()
