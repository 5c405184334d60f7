"""Flags of diffusers' training scripts that scripts here lack, and what to do instead: a name that is nearly the same
may do something else."""

LEAVE_OUT = "expected no such flag: "
NOT_OFFERED = "not offered here"
TEXT_ENCODERS = f"{NOT_OFFERED}: LoRA of Stable Diffusion and SDXL alone trains text encoders"

ADVICE = {
    "--class_labels_conditioning": NOT_OFFERED,
    "--pre_compute_text_embeddings": "expected --encoded_cache, which computes text embeddings and latents once",
    "--offset_noise": "expected --noise_offset 0.1, in scripts that have it",
    "--validation_scheduler": LEAVE_OUT + "images are generated with the pipeline's own scheduler",
    "--validation_images": NOT_OFFERED,
    "--tokenizer_name": LEAVE_OUT + "the base's own tokenizer is used",
    "--tokenizer_max_length": LEAVE_OUT + "captions have the length of the base's tokenizer",
    "--max_sequence_length": LEAVE_OUT + "captions have the length of the first tokenizer",
    "--text_encoder_use_attention_mask": NOT_OFFERED,
    "--train_text_encoder": TEXT_ENCODERS,
    "--skip_save_text_encoder": LEAVE_OUT + "the result has the text encoders of the base",
    "--text_encoder_lr": LEAVE_OUT + "all that is trained has --learning_rate",
    "--adam_weight_decay_text_encoder": LEAVE_OUT + "all that is trained has --adam_weight_decay",
    **dict.fromkeys(
        [f"--prodigy_{name}" for name in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")],
        "expected --optimizer prodigy, and its options in --optimizer_args",
    ),
    "--use_dora": NOT_OFFERED,
    "--output_kohya_format": LEAVE_OUT + "ppdiffusers-train convert-lora DIR --to kohya writes this format",
    "--do_edm_style_training": NOT_OFFERED,
    "--precondition_outputs": LEAVE_OUT + "the loss is that of the velocity, without preconditioning",
    "--snr_gamma": f"{NOT_OFFERED} for this objective",
    "--rank": "this one trains the whole model; the script of the same name with lora has this flag",
    "--offload_ema": LEAVE_OUT + "averages stay on the GPU",
    "--foreach_ema": LEAVE_OUT + "it would change the speed alone",
    "--non_ema_revision": LEAVE_OUT + "--revision is that of all parts",
}
