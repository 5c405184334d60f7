"""What happens when a run is resumed with other flags: a change is refused, applied, or allowed because it does not
affect the training.

Each flag of every script is in one of the three sets. Flags that only a user's own job has are applied.
"""

import json

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop.optimizers import check_same_optimizer
from ppdiffusers_train.runtime.agreement import digest

REFUSED = {
    # What is trained, and for which objective: the weights of the checkpoint would become a mixture.
    *("prediction_type", "lora_rank", "lora_alpha", "lora_target_modules", "trainable_modules", "train_text_encoder"),
    "use_rslora",
    "quantize_base",  # another base model
    *("snr_gamma", "noise_offset", "loss_type", "huber_c", "t5", "shift", "dynamic_shift"),
    *("input_perturbation", "dream_training", "dream_detail_preservation", "huber_schedule", "debiased_loss"),
    *("rescale_betas_zero_snr", "scale_v_pred_loss_like_noise_pred", "clip_skip"),
    *("max_token_length", "max_sequence_length"),
    *("multires_noise_discount", "multires_noise_iterations"),
    *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "min_timestep_boundary", "max_timestep_boundary"),
    *(f"timestep_bias_{name}" for name in ("strategy", "multiplier", "begin", "end", "portion")),
    *("num_ddim_timesteps", "timestep_scaling_factor", "unet_time_cond_proj_dim", "w_min", "w_max"),
    "prior_loss_weight",
    *("masked_loss", "mask_column", "alpha_mask", "masked_area_weight"),
    "background_color",  # part of the images, which must stay the same
    *("param_dtype", "param_rounding"),
    "aspect_ratio_buckets",  # the order of samples depends on it
}
APPLIED = {
    *("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_end"),
    *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "ema_decay", "lora_dropout"),
    *("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps"),
    *("resolution", "center_crop", "random_flip", "image_interpolation_mode", "interpolation_type", "min_image_size"),
    *("use_fix_crop_and_size", "proportion_empty_prompts", "encoded_cache", "cache_variants", "cast_teacher_unet"),
    *("shuffle_tags", "keep_tags", "tag_dropout", "wildcards"),
    *("mixed_precision", "amp_level", "allow_tf32", "max_bad_samples", "skip_nonfinite"),
    *("text_encoder_lr", "lora_plus_ratio", "optimizer_args", "max_grad_norm_per_parameter"),
    *("use_ema", "use_8bit_adam", "optimizer"),  # `TrainingState.load_optimizer` converts what the checkpoint has
}
FREE = {
    # Data and models: their contents are compared, wherever they are.
    *("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column"),
    *("train_shards_path_or_url", "caption_column", "caption", "caption_separator", "repeats"),
    *("class_data_dir", "class_prompt", "num_class_images", "with_prior_preservation", "prior_generation_precision"),
    *("sample_batch_size", "set_grads_to_none"),
    *("max_train_samples", "stream_lanes", "seed", "revision", "teacher_revision", "variant"),
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "pretrained_teacher_model"),
    "single_file_config",
    *("pretrained_prior_model_name_or_path", "pretrained_decoder_model_name_or_path", "init_lora"),
    # Where and how fast the run computes.
    *("gradient_checkpointing", "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"),
    "attention_slices",
    *("deterministic", "to_static", "sharding_degree", "sharding_stage", "collective_timeout", "local_rank"),
    "fused_backward",
    *("dataloader_num_workers", "vae_encode_batch_size", "peak_tflops", "cache_dir", "index_dir", "encoded_cache_dir"),
    # What is written and logged.
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "config", "dry_run", "stop_signal"),
    "accept_changed_data",
    *("checkpointing_steps", "checkpoints_total_limit", "final_checkpoint", "on_save_error", "save_format"),
    "validation_prompts_file",
    *("save_dtype", "validation_prompts", "num_validation_images", "validation_epochs", "validation_steps"),
    *("validation_loss_steps", "validation_data_dir", "validation_split"),  # the samples to train on are compared
    *("validation_inference_steps", "report_to", "logging_dir", "tracker_project_name", "debug_loss"),
    *("push_to_hub", "hub_token", "hub_model_id"),
}


WEIGHTS, SETTINGS = "weights of ", "settings of "  # how the names begin under which ranks compare models


def base_identity(compared: dict) -> dict:
    """What a run starts from: `{"weights": {model or flag: hash}, "settings": {model, scheduler or tokenizer: hash}}`,
    taken from what ranks compare."""
    weights = {name.removeprefix(WEIGHTS): value for name, value in compared.items() if name.startswith(WEIGHTS)}
    settings = {name.removeprefix(SETTINGS): value for name, value in compared.items() if name.startswith(SETTINGS)}
    hashes = {name: digest(json.dumps(value, sort_keys=True).encode()) for name, value in settings.items()}
    return {"weights": weights, "settings": hashes}


def weights_named(digests: dict) -> dict:
    """The names under which ranks compare hashes of weights."""
    return {f"{WEIGHTS}{name}": digest for name, digest in digests.items()}


def changed_flags(saved: dict, arguments: dict) -> dict:
    """{flag: (value in the checkpoint, value now)} of the flags that differ and are not `FREE`. A flag that the
    checkpoint does not have, because an older version wrote it, does not count as changed."""
    now = json.loads(json.dumps(arguments, default=str))
    names = [name for name in now if name in saved and name not in FREE and saved[name] != now[name]]
    return {name: (saved[name], now[name]) for name in names if meaning(saved, name) != meaning(now, name)}


def meaning(arguments: dict, name: str):
    """The value of a flag, or the one that it has where it is not given."""
    unset = {"lora_alpha": arguments.get("lora_rank")}
    return unset.get(name) if arguments[name] is None else arguments[name]


def refuse_mixture(checkpoint, saved: dict, arguments: dict, base: dict) -> None:
    """Raise a `UserError` if the run would become a mixture of two: by a flag, or by another base.

    Args:
        saved: the checkpoint's `state.json`.
        arguments: the flags of now.
        base: `base_identity` of now; what one of the two lacks is not compared.
    """
    schedulers = [found.get("settings", {}).get("scheduler") for found in (saved, base)]
    for name, (before, now) in changed_flags(saved.get("arguments", {}), arguments).items():
        if name == "prediction_type" and schedulers[0] and schedulers[0] == schedulers[1]:
            continue  # it names what the base predicts anyway
        if name in REFUSED:
            raise UserError(
                f"--{name}: {checkpoint} was trained with {before}, now it is {now}, which would mix two "
                f"runs; expected {as_flag(name, before)}, or a new run in another folder"
            )
    if saved:
        check_same_optimizer(checkpoint, saved.get("arguments", {}), arguments)
    for kind, digests in base.items():
        for name, before in saved.get(kind, {}).items():
            if digests.get(name, before) != before:
                raise UserError(
                    f"--resume_from_checkpoint: {checkpoint} was trained from other {kind} of {name}; expected the "
                    "same ones, or a new run in another folder"
                )


def as_flag(name: str, value) -> str:
    """What to write on a command line for a flag to have a value."""
    if value is None or value is False:
        return f"no --{name}"
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def describe_changes(checkpoint, saved: dict, arguments: dict) -> str:
    """A line that lists the changed flags; empty if there are none."""
    changed = changed_flags(saved.get("arguments", {}), arguments)
    listed = ", ".join(f"--{name} {before} -> {now}" for name, (before, now) in changed.items())
    return f"changed since {checkpoint.name}, from this step on: {listed}" if listed else ""
