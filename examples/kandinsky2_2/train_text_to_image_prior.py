"""Fine-tune the prior of Kandinsky 2.2: the transformer that predicts an image's CLIP embedding from its caption.

    python -u train_text_to_image_prior.py --train_data_dir photos --output_dir my-prior

The result is a prior pipeline; its components, loaded by `DiffusionPipeline.from_pretrained`, work with any decoder.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from ppdiffusers import DDPMScheduler, PriorTransformer
from ppdiffusers.transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ppdiffusers_train.data.tags import draw_caption
from ppdiffusers_train.data.transforms import without_ends
from ppdiffusers_train.job import DenoisingTraining, job_main
from ppdiffusers_train.models.attention import announce_plain_attention
from ppdiffusers_train.models.kandinsky2_2 import KandinskyFolders, WithImageEmbeddings
from ppdiffusers_train.models.recompute import enable_recompute
from ppdiffusers_train.models.text import as_computed, tokenize, warn_of_long_captions
from ppdiffusers_train.module import keep_frozen


def build_parser(doc=__doc__):
    parser = arguments.ArgumentParser(description=doc.splitlines()[0])
    arguments.add_kandinsky_arguments(parser)
    arguments.add_diffusion_arguments(parser)
    arguments.add_run_arguments(parser, "kandi_2_2-model-finetuned", train_batch_size=1, adam_weight_decay=0.0)
    return parser


class KandinskyPriorTrainingModule(WithImageEmbeddings, DenoisingTraining):
    """Trains the prior to predict an image's normalised CLIP embedding from a noisy one, conditioned on the caption."""

    title = "Kandinsky 2.2 prior"
    trained = "prior"
    encoders = ("image_encoder", "text_encoder")
    can_compile_encode = True

    def __init__(self, args):
        super().__init__()
        self.args = args
        names = args.pretrained_decoder_model_name_or_path, args.pretrained_prior_model_name_or_path
        self.folders = KandinskyFolders(*names, args.cache_dir, args.variant, weights=not args.dry_run)
        folder = self.folders.prior
        if args.validation_prompts or args.validation_prompts_file:
            self.folders.check_resolution(args.resolution)  # only validation needs the decoder
        self.image_processor = folder.load("image_processor", CLIPImageProcessor)
        self.tokenizer = folder.load("tokenizer", CLIPTokenizer)
        self.load_later("image_encoder", folder.later("image_encoder", CLIPVisionModelWithProjection))
        self.load_later("text_encoder", folder.later("text_encoder", CLIPTextModelWithProjection))
        self.prior = folder.load("prior", PriorTransformer)
        self.folders.check_clip_std(self.prior)
        keep_frozen(self.prior.clip_mean, self.prior.clip_std)  # statistics of the embeddings, stored as parameters
        # Inference uses a scheduler of another class for the same diffusion process.
        self.use_scheduler(DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"))
        if args.gradient_checkpointing:
            enable_recompute(self.prior)
        if args.enable_xformers_memory_efficient_attention:
            announce_plain_attention("the prior's attention has a mask")
        if args.attention_slices == "auto":
            announce_plain_attention("the prior's matrices are small", "--attention_slices auto")

    def encoding_settings(self):
        names = ["proportion_empty_prompts", "shuffle_tags", "keep_tags", "tag_dropout", "wildcards"]
        return {
            **{name: getattr(self.args, name) for name in names},
            "image_processor": self.image_processor.to_dict(),
            "tokenizer": self.tokenizer.get_vocab(),
        }

    def preprocess(self, row, draws):
        """clip_pixel_values as CLIP crops them; input_ids and text_mask [L] of the caption."""
        args = self.args
        how = args.proportion_empty_prompts, args.shuffle_tags, args.keep_tags, args.tag_dropout, args.wildcards
        caption = draw_caption(draws, row["caption"], *how)
        input_ids, text_mask = tokenize(self.tokenizer, caption)
        clip_pixels = self.image_processor(without_ends(row["image"]), return_tensors="np").pixel_values[0]
        return {"clip_pixel_values": clip_pixels, "input_ids": input_ids, "text_mask": text_mask}

    def encode(self, batch):
        """image_embeds, prompt_embeds [B, D]; prompt_hidden_states [B, L, D]; text_mask [B, L]."""
        text = self.text_encoder(batch["input_ids"])
        return {
            "image_embeds": self.embed_image(batch["clip_pixel_values"]),
            "prompt_embeds": text.text_embeds,
            "prompt_hidden_states": as_computed(self.text_encoder, text.last_hidden_state),
            "text_mask": batch["text_mask"],
        }

    def inspect_dataset(self, dataset):
        warn_of_long_captions(self.tokenizer, dataset)

    def forward(self, encoded, draws):
        target = (encoded["image_embeds"] - self.prior.clip_mean) / self.prior.clip_std
        noise = draws.normal("noise", target.shape[1:])
        timesteps = draws.integers("timesteps", 0, self.scheduler.config.num_train_timesteps)
        prediction = self.prior(
            self.add_noise(draws, target, noise, timesteps),
            timesteps,
            proj_embedding=encoded["prompt_embeds"],
            encoder_hidden_states=encoded["prompt_hidden_states"],
            attention_mask=encoded["text_mask"],
        ).predicted_image_embedding
        return self.denoising_loss(prediction, target, noise, timesteps)

    def generate(self, prompts, seeds, options=None):
        names = ("prior", "image_encoder", "text_encoder", "tokenizer", "image_processor")
        own = {f"prior_{name}": getattr(self, name) for name in names}
        how = self.args.resolution, self.args.validation_inference_steps, options
        return self.folders.generate(own, prompts, seeds, *how)

    def save_pretrained(self, directory):
        self.folders.export_prior(directory, own={"prior": self.prior}, save_format=self.args.save_format)

    def card_data(self):
        return {
            "base_model": self.args.pretrained_prior_model_name_or_path,
            "tags": ["kandinsky", "text-to-image", "ppdiffusers"],
        }


main = job_main(build_parser, KandinskyPriorTrainingModule)

if __name__ == "__main__":
    main()
