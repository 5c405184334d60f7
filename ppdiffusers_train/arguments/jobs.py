"""Flags of single jobs, in titled groups: their models, images, losses and LoRA layers. The jobs read them.

Scripts import them from `ppdiffusers_train.arguments`, like the flags that all runs need.
"""

from ppdiffusers_train.arguments.parser import Flag, non_negative_float, positive_float, positive_int, unit_float

TIMESTEP_BIAS_STRATEGIES = ("none", "earlier", "later", "range")
INTERPOLATION_MODES = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest-exact")


def add_kandinsky_arguments(parser):
    """The two pipelines that Kandinsky 2.2 consists of, read by its jobs."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_decoder_model_name_or_path", default="kandinsky-community/kandinsky-2-2-decoder",
        help="Folder or hub name of the decoder pipeline (UNet, MoVQ, scheduler).",
    )  # fmt: skip
    group.add_argument(
        "--pretrained_prior_model_name_or_path", default="kandinsky-community/kandinsky-2-2-prior",
        help="Folder or hub name of the prior pipeline (CLIP's encoders, prior).",
    )  # fmt: skip
    return group


def add_pipeline_arguments(parser):
    """The pipeline that a job starts from, read by the jobs of Stable Diffusion XL and 3."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Folder or hub name of the pipeline to fine-tune."
    )
    group.add_argument(
        "--pretrained_vae_model_name_or_path", help="Folder or hub name of a VAE to use instead of the pipeline's."
    )
    group.add_argument("--revision", help="Revision of the pipeline on the hub.")
    group.add_argument("--variant", help="Variant of the weight files, such as fp16.")
    return group


def add_image_arguments(parser):
    """How images are resized and cropped, read by the same jobs."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--aspect_ratio_buckets", action=Flag,
        help="Crop each image to the nearest of several sizes with as many pixels as resolution x resolution, instead "
        "of a square.",
    )  # fmt: skip
    add_crop_arguments(group)
    group.add_argument(
        "--image_interpolation_mode", choices=INTERPOLATION_MODES, default="lanczos",
        help="Interpolation that resizes images.",
    )  # fmt: skip
    group.add_argument(
        "--min_image_size", type=positive_int, metavar="PIXELS",
        help="Treat images whose shorter side has fewer pixels as bad samples.",
    )  # fmt: skip
    return group


def add_crop_arguments(group):
    """Crops and flips, read by the jobs."""
    group.add_argument("--center_crop", action=Flag, help="Crop the centre; without it, crops are random.")
    group.add_argument("--random_flip", action=Flag, help="Flip images horizontally with probability 0.5.")


def add_diffusion_arguments(parser, noise_offset=False):
    """How the denoising loss is computed, read by the jobs; `noise_offset` where there are latents to offset."""
    group = parser.add_argument_group("diffusion")
    group.add_argument(
        "--snr_gamma", type=positive_float, help="Gamma of min-SNR loss weights; the paper recommends 5.0."
    )
    add_empty_prompts_argument(group)
    if noise_offset:
        group.add_argument(
            "--noise_offset", type=non_negative_float, default=0.0, help="Scale of the noise offset; 0 adds none."
        )
    return group


def add_empty_prompts_argument(group):
    """How often a sample is trained without its conditioning, for classifier-free guidance: read by the jobs."""
    group.add_argument(
        "--proportion_empty_prompts", type=unit_float, default=0.0,
        help="Probability that a caption is dropped, for classifier-free guidance.",
    )  # fmt: skip


def add_flow_matching_arguments(parser):
    """How often timesteps of a flow are sampled, and how their losses are weighted, read by the jobs of SD3."""
    group = parser.add_argument_group("flow matching")
    add = group.add_argument
    add(
        "--weighting_scheme", choices=("uniform", "logit-normal", "mode", "bell"), default="logit-normal",
        help="Density of the timesteps; bell samples uniformly and weights losses most in the middle.",
        type=lambda name: name.replace("_", "-"),
    )  # fmt: skip
    add("--logit_mean", type=float, default=0.0, help="Mean of the logit-normal density; above 0, it favours noise.")
    add("--logit_std", type=float, default=1.0, help="Standard deviation of the logit-normal density.")
    add("--mode_scale", type=float, default=1.29, help="Scale of the mode density; above 0, it favours the middle.")
    add(
        "--shift", type=positive_float,
        help="Shift of the timesteps towards noise; without it, that of the pipeline's scheduler.",
    )  # fmt: skip
    add(
        "--min_timestep_boundary", type=float, default=0.0,
        help="Start of the timesteps that are trained, as a fraction of the way from noise (0) to image (1).",
    )  # fmt: skip
    add(
        "--max_timestep_boundary", type=float, default=1.0,
        help="End of the timesteps that are trained, as a fraction of the way from noise (0) to image (1).",
    )  # fmt: skip
    add_empty_prompts_argument(group)
    return group


def add_timestep_arguments(parser):
    """Which timesteps are sampled more often, read by the jobs."""
    group = parser.add_argument_group("timesteps")
    group.add_argument(
        "--timestep_bias_strategy", choices=TIMESTEP_BIAS_STRATEGIES, default="none",
        help="Timesteps that are sampled more often than others.",
    )  # fmt: skip
    group.add_argument(
        "--timestep_bias_multiplier", type=float, default=1.0, help="Factor by which they are sampled more often."
    )
    group.add_argument("--timestep_bias_begin", type=int, default=0, help="First timestep of the strategy `range`.")
    group.add_argument(
        "--timestep_bias_end", type=int, default=1000,
        help="End of the strategy `range`; this timestep is no longer part of it.",
    )  # fmt: skip
    group.add_argument(
        "--timestep_bias_portion", type=float, default=0.25,
        help="Fraction of all timesteps that the strategies `earlier` and `later` mean.",
    )  # fmt: skip
    return group


def add_distillation_arguments(parser):
    """The teacher, and how a student with few steps is distilled from it, read by the jobs of latent consistency."""
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_teacher_model", required=True, help="Folder or hub name of the teacher's pipeline.")
    add(
        "--pretrained_vae_model_name_or_path",
        help="Folder or hub name of a VAE to use instead of the teacher's.",
    )  # fmt: skip
    add("--teacher_revision", help="Revision of the teacher on the hub.")
    add("--revision", help="Older name of --teacher_revision.")
    add("--cast_teacher_unet", action=Flag, help="Cast the teacher to the dtype of --mixed_precision.")

    add = parser.add_argument_group("distillation").add_argument
    add("--w_min", type=float, default=5.0, help="Smallest guidance w, which is a pipeline's guidance scale minus 1.")
    add("--w_max", type=float, default=15.0, help="Largest guidance w.")
    add("--num_ddim_timesteps", type=positive_int, default=50, help="Number of steps of the teacher's DDIM solver.")
    add(
        "--loss_type", choices=("l2", "huber"), default="l2",
        help="Loss between the predictions of student and target.",
    )  # fmt: skip
    add(
        "--huber_c", type=positive_float, default=0.001,
        help="Difference at which the Huber loss turns from quadratic to linear.",
    )  # fmt: skip
    add(
        "--timestep_scaling_factor", type=positive_float, default=10.0,
        help="Factor on timesteps in the boundary condition of the consistency function.",
    )  # fmt: skip

    group = parser.add_argument_group("images")
    add_crop_arguments(group)
    group.add_argument(
        "--interpolation_type", choices=INTERPOLATION_MODES, default="bilinear",
        help="Interpolation that resizes images.",
    )  # fmt: skip
    add_empty_prompts_argument(group)
    group.add_argument(
        "--vae_encode_batch_size", type=positive_int, default=1,
        help="Number of samples that are encoded together; more are faster on a GPU, with 1 a sample's encoding has "
        "the same bits in any batch.",
    )  # fmt: skip
    return group


def add_student_arguments(parser):
    """The student and its average, where they are models of their own, read by the same jobs."""
    group = parser.add_argument_group("student and target")
    group.add_argument(
        "--unet_time_cond_proj_dim", type=positive_int, default=256,
        help="Number of channels of the student's embedding of the guidance.",
    )  # fmt: skip
    group.add_argument(
        "--ema_decay", type=unit_float, default=0.95, help="Decay of the target network's average at each step."
    )
    return group


def add_lora_arguments(parser, targets, rank=4, **defaults):
    """The LoRA layers that are trained, read by the LoRA jobs; `defaults` are those of other flags, with LoRA."""
    parser.set_defaults(**defaults)
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_rank", "--rank", type=positive_int, default=rank, help="Rank of the LoRA layers.")
    group.add_argument(
        "--lora_alpha", type=positive_float,
        help="Alpha of the LoRA layers, whose output is scaled by alpha / rank; without it, the rank.",
    )  # fmt: skip
    group.add_argument(
        "--lora_dropout", type=unit_float, default=0.0, help="Dropout probability of the LoRA layers' input."
    )
    group.add_argument(
        "--lora_target_modules", default=targets, metavar="NAMES",
        help="Layers that get LoRA: ends of their names, separated by commas.",
    )  # fmt: skip
    return group


def add_kandinsky_lora_arguments(parser, targets):
    """The same for the jobs of Kandinsky 2.2, with their defaults of other flags. Returns the parser."""
    defaults = {"output_dir": "kandi_2_2-model-finetuned-lora", "num_validation_images": 4, "validation_epochs": 1}
    add_lora_arguments(parser, targets, **defaults)
    return parser
