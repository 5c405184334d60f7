"""Flags of diffusers' training scripts that have another name here, or no place: what to write instead."""

# {flag of diffusers: why it is refused}, for the scripts that do not have it.
INSTEAD = {
    "--train_text_encoder": "only the LoRA scripts of Stable Diffusion and SDXL train text encoders",
    "--text_encoder_lr": "text encoders are not trained here",
    "--use_dora": "there is no DoRA here; leave it out to train a plain LoRA",
    "--output_kohya_format": "write kohya's names with `ppdiffusers-train convert-lora RESULT --to kohya`",
    "--pre_compute_text_embeddings": "--encoded_cache encodes captions and images once",
    "--skip_save_text_encoder": "a LoRA has its own weights only, and a full result is a whole pipeline",
    "--tokenizer_name": "the tokenizer is the base model's",
    "--tokenizer_max_length": "captions are as long as the base model's tokenizer allows",
    "--text_encoder_use_attention_mask": "attention masks are those of the base model's pipeline",
    "--non_ema_revision": "--revision names the revision of all parts",
    "--foreach_ema": "averages are always updated in one go; leave it out",
    "--offload_ema": "averages stay on the GPU; leave it out, or --no_use_ema needs no memory for them",
    "--offset_noise": "--noise_offset 0.1 does it",
    "--validation_images": "validation images are drawn from prompts: --validation_prompt",
    "--validation_scheduler": "validation images are drawn with the base model's scheduler",
    "--class_labels_conditioning": "no model here has class labels",
    "--do_edm_style_training": "there is no EDM training here",
    "--precondition_outputs": "the loss is of the velocity, without preconditioning",
    "--rank": "only the LoRA scripts have a rank",
}
