"""Distill Stable Diffusion XL into a latent consistency model: a UNet that draws in one to eight steps.

    python -u train_lcm_distill_sdxl_wds.py --pretrained_teacher_model sdxl --train_data_dir photos --output_dir lcm

The results are the student, `lcm/unet`, and its average, `lcm/unet_target`, each for a pipeline with `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import sys
from pathlib import Path

import numpy as np
import paddle

from ppdiffusers_train.arguments import Flag
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.errors import one_line_errors
from ppdiffusers_train.models.sdxl import SDXLFolder, encode_prompts
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.module import freeze
from ppdiffusers_train.training import check_run, launch_training_task

sys.path.append(str(Path(__file__).parent))  # where this file is imported, not run
from train_lcm_distill_sd_wds import LCMTrainingModule  # noqa: E402
from train_lcm_distill_sd_wds import build_parser as build_sd_parser  # noqa: E402


def build_parser():
    return add_sdxl_arguments(build_sd_parser(__doc__))


def add_sdxl_arguments(parser):
    """What the LoRA's script has, too."""
    parser.add_argument(
        "--use_fix_crop_and_size", action=Flag, help="tell the UNet the resolution and no crop, whatever was taken"
    )
    parser.set_defaults(resolution=1024, w_min=3.0)
    return parser


class LCMSDXLTrainingModule(LCMTrainingModule):
    """The same for a UNet that is told two encoders' tokens, the pooled caption, the image's size and its crop."""

    encoders = ("vae", "text_encoder", "text_encoder_2")

    def open_folder(self):
        args = self.args
        self.folder = SDXLFolder(
            args.pretrained_teacher_model, args.pretrained_vae_model_name_or_path, "--pretrained_teacher_model",
            args.cache_dir, args.teacher_revision or args.revision, weights=not args.dry_run,
        )  # fmt: skip
        self.tokenizer, self.tokenizer_2 = self.folder.load("tokenizer"), self.folder.load("tokenizer_2")
        self.text_encoder = freeze(self.folder.load("text_encoder"))
        self.text_encoder_2 = freeze(self.folder.load("text_encoder_2"))
        ids = (paddle.to_tensor(tokenize(each, "")[0][None]) for each in (self.tokenizer, self.tokenizer_2))
        has_prompt = paddle.to_tensor([float(not self.folder.no_prompt_is_zeros)])
        with paddle.no_grad():
            self.empty_prompt = encode_prompts(self.text_encoder, self.text_encoder_2, *ids, has_prompt)

    def preprocess(self, row, draws):
        """pixel_values [3, R, R]; input_ids, input_ids_2 [L]; has_prompt [], 0 where the embeddings are to be zeros;
        time_ids [6]: height and width of the file, top and left of the crop, height and width of what is drawn."""
        args, image, size = self.args, row["image"], self.args.resolution
        crop, top, left = fit(image, size, size, draws, args.interpolation_type, args.center_crop, args.random_flip)
        dropped = draws.happens("drop_caption", args.proportion_empty_prompts)
        caption = "" if dropped else row["caption"]
        told = (size, size, 0, 0) if args.use_fix_crop_and_size else (image.height, image.width, top, left)
        return {
            "pixel_values": normalize_pixels(crop),
            "time_ids": np.float32([*told, size, size]),
            "input_ids": tokenize(self.tokenizer, caption)[0],
            "input_ids_2": tokenize(self.tokenizer_2, caption)[0],
            "has_prompt": np.float32(not (dropped and self.folder.no_prompt_is_zeros)),
        }

    def encoding_settings(self):
        settings = super().encoding_settings()
        return {
            **settings,
            "use_fix_crop_and_size": self.args.use_fix_crop_and_size,
            "no_prompt_is_zeros": self.folder.no_prompt_is_zeros,
            "tokenizers": [settings.pop("tokenizer"), self.tokenizer_2.get_vocab()],
        }

    def encode(self, batch):
        """latents [B, 4, r, r], scaled; prompt_embeds [B, L, D]; pooled_prompt_embeds [B, P]; time_ids [B, 6]."""
        embeds, pooled = encode_prompts(
            self.text_encoder, self.text_encoder_2, batch["input_ids"], batch["input_ids_2"], batch["has_prompt"]
        )
        return {
            "latents": encode_images(self.vae, batch["pixel_values"]),
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": batch["time_ids"],
        }

    def conditions(self, encoded):
        """What the UNets are told: the caption, and nothing; sizes and crop alike."""
        caption, sizes = (encoded["prompt_embeds"], encoded["pooled_prompt_embeds"]), encoded["time_ids"]
        nothing = (empty.expand(told.shape) for empty, told in zip(self.empty_prompt, caption))
        return tuple(
            {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}
            for tokens, text in (caption, nothing)
        )

    def text_parts(self):
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": ["stable-diffusion-xl", *card["tags"]]}


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    launch_training_task(LCMSDXLTrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
