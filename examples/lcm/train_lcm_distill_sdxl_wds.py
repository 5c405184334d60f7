"""Distill Stable Diffusion XL into a latent consistency model: a UNet that generates images in one to eight steps.

    python -u train_lcm_distill_sdxl_wds.py --pretrained_teacher_model sdxl --train_data_dir photos --output_dir lcm

The results are the student, `lcm/unet`, and its average, `lcm/unet_target`, each for a pipeline with `LCMScheduler`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import numpy as np
import paddle
from train_lcm_distill_sd_wds import LCMTrainingModule
from train_lcm_distill_sd_wds import build_parser as build_sd_parser

from ppdiffusers_train.arguments import Flag
from ppdiffusers_train.data.tags import vary_tags
from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.job import job_main
from ppdiffusers_train.models.sdxl import SDXLFolder, encode_captions, tokenize_caption
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.module import freeze


def build_parser():
    return add_sdxl_arguments(build_sd_parser(__doc__))


def add_sdxl_arguments(parser):
    """Add the flags that the LoRA script shares."""
    parser.add_argument(
        "--use_fix_crop_and_size", action=Flag,
        help="Condition on the resolution and no crop, whatever the image.",
    )  # fmt: skip
    parser.set_defaults(resolution=1024, w_min=3.0)
    return parser


class LCMSDXLTrainingModule(LCMTrainingModule):
    """The same for a UNet conditioned on two text encoders' tokens, the pooled caption, the image's size and crop."""

    title = "LCM of SDXL"
    folder_class = SDXLFolder
    encoders = ("vae", "text_encoder", "text_encoder_2")

    def load_text_encoders(self):
        self.tokenizer, self.tokenizer_2 = self.folder.load("tokenizer"), self.folder.load("tokenizer_2")
        self.text_encoder = freeze(self.folder.load("text_encoder"))
        self.text_encoder_2 = freeze(self.folder.load("text_encoder_2"))
        empty = tokenize_caption(self.tokenizer, self.tokenizer_2, "", True, self.folder.no_prompt_is_zeros)
        tokens = {name: paddle.to_tensor(array[None]) for name, array in empty.items()}
        self.empty_prompt = encode_captions(self.text_encoder, self.text_encoder_2, tokens)

    def preprocess(self, row, draws):
        """pixel_values [3, R, R]; input_ids, input_ids_2 [L]; has_prompt [], 0 where the embeddings are to be zeros;
        time_ids [6]: height and width of the file, top and left of the crop, height and width of the crop."""
        args, image, size = self.args, row["image"], self.args.resolution
        crop, top, left = fit(image, size, size, draws, args.interpolation_type, args.center_crop, args.random_flip)
        caption = vary_tags(draws, row["caption"], args.shuffle_tags, args.keep_tags, args.tag_dropout, args.wildcards)
        is_dropped = draws.bernoulli("drop_caption", args.proportion_empty_prompts)
        zeros = self.folder.no_prompt_is_zeros
        original = (size, size, 0, 0) if args.use_fix_crop_and_size else (image.height, image.width, top, left)
        return {
            "pixel_values": normalize_pixels(crop),
            "time_ids": np.float32([*original, size, size]),
            **tokenize_caption(self.tokenizer, self.tokenizer_2, caption, is_dropped, zeros),
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
        captions = encode_captions(self.text_encoder, self.text_encoder_2, batch)
        return {"latents": encode_images(self.vae, batch["pixel_values"]), **captions, "time_ids": batch["time_ids"]}

    def conditions(self, encoded):
        """The UNets' conditioning with the caption and without; sizes and crop are the same."""
        empty = {name: empty.expand(encoded[name].shape) for name, empty in self.empty_prompt.items()}
        return tuple(
            {
                "encoder_hidden_states": captions["prompt_embeds"],
                "added_cond_kwargs": {"text_embeds": captions["pooled_prompt_embeds"], "time_ids": encoded["time_ids"]},
            }
            for captions in (encoded, empty)
        )

    def card_data(self):
        card = super().card_data()
        return {**card, "tags": ["stable-diffusion-xl", *card["tags"]]}


main = job_main(build_parser, LCMSDXLTrainingModule)

if __name__ == "__main__":
    main()
