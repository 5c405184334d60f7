"""Flags of single jobs, in titled groups: their models, images, losses and LoRA layers. The jobs read them.

Scripts take them from `arguments.py`, with the flags that every run has.
"""

from ppdiffusers_train.arguments.parser import Flag, non_negative_float, positive_float, positive_int, unit_float

TIMESTEP_BIAS_STRATEGIES = ("none", "earlier", "later", "range")
INTERPOLATION_MODES = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest-exact")


def add_kandinsky_arguments(parser):
    """The two pipelines that Kandinsky 2.2 consists of, read by its jobs."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_decoder_model_name_or_path",
        default="kandinsky-community/kandinsky-2-2-decoder",
        help="folder or hub name of the decoder pipeline: UNet, MoVQ, scheduler",
    )
    group.add_argument(
        "--pretrained_prior_model_name_or_path",
        default="kandinsky-community/kandinsky-2-2-prior",
        help="folder or hub name of the prior pipeline: CLIP's towers, the prior",
    )
    return group


def add_pipeline_arguments(parser, vae_help="folder or hub name of another VAE"):
    """The pipeline that a job starts from, read by the jobs of Stable Diffusion XL and 3."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, help="folder or hub name of the pipeline to start from"
    )
    group.add_argument("--pretrained_vae_model_name_or_path", help=vae_help)
    group.add_argument("--revision", help="revision of the pipeline on the hub")
    group.add_argument("--variant", help="variant of the weights' files, such as fp16")
    return group


def add_image_arguments(parser):
    """How images are brought to the resolution, read by the same jobs."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--aspect_ratio_buckets",
        action=Flag,
        help="crop each image to the nearest of sizes with as many pixels as resolution x resolution, not to a square",
    )
    group.add_argument("--center_crop", action=Flag, help="crop the centre; default: anywhere, drawn for each sample")
    group.add_argument("--random_flip", action=Flag, help="mirror every second image, drawn for each sample")
    group.add_argument("--image_interpolation_mode", choices=INTERPOLATION_MODES, default="lanczos", help="of resizing")
    group.add_argument(
        "--min_image_size", type=positive_int, metavar="PIXELS", help="refuse images with a shorter side than this"
    )
    return group


def add_diffusion_arguments(parser, noise_offset=False):
    """How the denoising loss is built, read by the jobs; `noise_offset` where there are latents to offset."""
    group = parser.add_argument_group("diffusion")
    group.add_argument("--snr_gamma", type=positive_float, help="min-SNR loss weights; 5.0 is the paper's value")
    add_empty_prompts_argument(group)
    if noise_offset:
        group.add_argument("--noise_offset", type=non_negative_float, default=0.0, help="scale of the offset noise")
    return group


def add_empty_prompts_argument(group):
    """How often a sample is learned without what describes it, as guidance draws: read by the jobs."""
    group.add_argument(
        "--proportion_empty_prompts", type=unit_float, default=0.0, help="share of captions that are dropped, at random"
    )


def add_flow_matching_arguments(parser):
    """Which timesteps of a flow are trained how often, and how their losses count, read by the jobs of SD3."""
    group = parser.add_argument_group("flow matching")
    add = group.add_argument
    add(
        "--weighting_scheme", choices=("uniform", "logit-normal", "mode", "bell"), default="logit-normal",
        help="density of the timesteps; bell: uniform, with losses that count most in the middle",
        type=lambda name: name.replace("_", "-"),
    )  # fmt: skip
    add("--logit_mean", type=float, default=0.0, help="of logit-normal; above 0 prefers noise")
    add("--logit_std", type=float, default=1.0, help="of logit-normal")
    add("--mode_scale", type=float, default=1.29, help="of mode; above 0 prefers the middle")
    add("--shift", type=positive_float, help="of timesteps towards noise; default: the scheduler's")
    add("--min_timestep_boundary", type=float, default=0.0, help="train from this share of the way from noise to image")
    add("--max_timestep_boundary", type=float, default=1.0, help="train up to this share of it")
    add_empty_prompts_argument(group)
    return group


def add_timestep_arguments(parser):
    """Which timesteps training prefers, read by the jobs."""
    group = parser.add_argument_group("timesteps")
    group.add_argument(
        "--timestep_bias_strategy", choices=TIMESTEP_BIAS_STRATEGIES, default="none", help="which are drawn more often"
    )
    group.add_argument("--timestep_bias_multiplier", type=float, default=1.0, help="how much more often")
    group.add_argument("--timestep_bias_begin", type=int, default=0, help="first timestep of the strategy `range`")
    group.add_argument("--timestep_bias_end", type=int, default=1000, help="first timestep behind the range")
    group.add_argument(
        "--timestep_bias_portion", type=float, default=0.25, help="share of all that is `earlier` or `later`"
    )
    return group


def add_distillation_arguments(parser):
    """The teacher, and how a student with few steps is distilled from it, read by the jobs of latent consistency."""
    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_teacher_model", required=True, help="folder or hub name of the teacher's pipeline")
    group.add_argument("--pretrained_vae_model_name_or_path", help="folder or hub name of another VAE")
    group.add_argument("--teacher_revision", help="revision of the teacher on the hub")
    group.add_argument("--revision", help="the same, by its older name")
    group.add_argument("--cast_teacher_unet", action=Flag, help="the teacher in the low type of --mixed_precision, too")

    group = parser.add_argument_group("distillation")
    group.add_argument("--w_min", type=float, default=5.0, help="smallest guidance (a pipeline's scale less 1)")
    group.add_argument("--w_max", type=float, default=15.0, help="largest guidance")
    group.add_argument("--num_ddim_timesteps", type=positive_int, default=50, help="steps of the teacher's solver")
    group.add_argument("--loss_type", choices=("l2", "huber"), default="l2", help="distance of student and target")
    group.add_argument("--huber_c", type=positive_float, default=0.001, help="where huber turns from square to linear")
    group.add_argument("--timestep_scaling_factor", type=positive_float, default=10.0, help="of the boundary condition")

    group = parser.add_argument_group("images")
    group.add_argument("--center_crop", action=Flag, help="crop the centre; default: anywhere, drawn for each sample")
    group.add_argument("--random_flip", action=Flag, help="mirror every second image, drawn for each sample")
    group.add_argument("--interpolation_type", choices=INTERPOLATION_MODES, default="bilinear", help="of resizing")
    add_empty_prompts_argument(group)
    group.add_argument(
        "--vae_encode_batch_size", type=positive_int, default=1,
        help="samples encoded together: several are faster on a card, one has the same bits in any batch",
    )  # fmt: skip
    return group


def add_student_arguments(parser):
    """The student and its average, where they are models of their own, read by the same jobs."""
    group = parser.add_argument_group("student and target")
    group.add_argument(
        "--unet_time_cond_proj_dim", type=positive_int, default=256, help="channels that tell the student its guidance"
    )
    group.add_argument("--ema_decay", type=unit_float, default=0.95, help="of the target network, each step")
    return group


def add_lora_arguments(parser, targets, rank=4, **defaults):
    """The LoRA layers that are trained, read by the LoRA jobs; `defaults` are those of other flags, with LoRA."""
    parser.set_defaults(**defaults)
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_rank", "--rank", type=positive_int, default=rank, help="rank of the updates")
    group.add_argument(
        "--lora_alpha", type=positive_float, help="updates are scaled by alpha / rank; default: the rank"
    )
    group.add_argument("--lora_dropout", type=unit_float, default=0.0, help="dropout before each update, in training")
    group.add_argument(
        "--lora_target_modules", default=targets, metavar="NAMES", help="ends of layer names, separated by commas"
    )
    return group
