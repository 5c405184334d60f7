"""Flags that the training scripts share, in titled groups, and the parser that reads them.

A script builds its parser from the groups it needs and adds its own. The parser also takes `--config file.yaml`, whose
keys are the flags' names (the command line wins), and answers every mistake with one line and status 2.
"""

from ppdiffusers_train.argument_parser import (
    ArgumentParser,
    Flag,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
    unit_float,
)
from ppdiffusers_train.output_arguments import (
    add_output_arguments,
    add_reporting_arguments,
    add_validation_arguments,
)

__all__ = [  # for scripts, beside the groups below
    "ArgumentParser", "Flag", "unit_float", "add_output_arguments", "add_reporting_arguments",
    "add_validation_arguments",
]  # fmt: skip

TIMESTEP_BIAS_STRATEGIES = ("none", "earlier", "later", "range")
INTERPOLATION_MODES = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest-exact")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def add_data_arguments(parser):
    """Where the samples come from, read by `data.dataset.build_dataset`."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="dataset on the hub, or a path that `datasets.load_dataset` understands")
    group.add_argument("--dataset_config_name", help="configuration of the dataset, where it has several")
    group.add_argument("--train_data_dir", metavar="DIR", help="folder of images with a metadata.jsonl beside them")
    group.add_argument(
        "--train_shards_path_or_url", metavar="SHARDS",
        help="tar shards in the WebDataset format: a folder, a file, a pattern such as photos-{000..031}.tar, an "
        "http(s) address, or pipe:COMMAND, which is run in a shell",
    )  # fmt: skip
    group.add_argument("--image_column", default="image", help="column that holds the images")
    group.add_argument("--caption_column", default="text", help="column, or field of .json, with the captions")
    group.add_argument("--max_train_samples", type=positive_int, help="use this many samples, chosen by the seed")
    group.add_argument("--cache_dir", metavar="DIR", help="where downloaded models and datasets are kept")
    group.add_argument(
        "--encoded_cache",
        action=Flag,
        default=None,
        help="run the frozen encoders once per sample, keep the results in output_dir/encoded, and train from them",
    )
    group.add_argument("--encoded_cache_dir", metavar="DIR", help="keep them here instead, for other runs, too")
    group.add_argument(
        "--cache_variants", type=positive_int, default=1, help="random crops and flips of a sample that the cache keeps"
    )
    group.add_argument(
        "--max_bad_samples", type=non_negative_int, default=0, help="samples that cannot be used are skipped up to here"
    )
    group.add_argument("--resolution", type=positive_int, default=512, help="height and width of the images, in pixels")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=0, help="threads that load images")
    return group


def add_training_arguments(parser, weight_decay=0.01, train_batch_size=16):
    """Length, batch, optimizer and precision of the run, read by the loop."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--dry_run", action=Flag, help="print what would happen, with the memory it takes, and end: nothing is loaded"
    )
    group.add_argument("--seed", type=seed, help="seed of the run; without it one is drawn and printed")
    group.add_argument("--train_batch_size", type=positive_int, default=train_batch_size, help="samples per card")
    group.add_argument("--num_train_epochs", type=positive_int, default=100, help="how often each sample is seen")
    group.add_argument("--max_train_steps", type=positive_int, help="optimizer steps; overrides the number of epochs")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="batches per optimizer step")
    group.add_argument("--gradient_checkpointing", action=Flag, help="recompute activations: less memory, more time")
    group.add_argument(
        "--trainable_modules", metavar="PATTERNS", help="train these parts of the model in full, and else at most LoRA "
        "layers: names of layers or parameters, separated by commas, * for anything: blocks.*.norm1,proj_out",
    )  # fmt: skip
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action=Flag,
        help="Paddle's own memory-efficient attention, where the installed Paddle and the device have it",
    )
    group.add_argument(
        "--skip_nonfinite", type=non_negative_int, default=0, metavar="N",
        help="drop up to N steps whose loss or gradient is not a number; at the next one, stop",
    )  # fmt: skip
    group.add_argument("--deterministic", action=Flag, help="ask Paddle for deterministic kernels on cards; slower")
    group.add_argument("--allow_tf32", action=Flag, help="TF32 in matrix products (cards of the Ampere series on)")
    group.add_argument("--to_static", action=Flag, help="trace the models that learn: a slow start for faster steps")
    group.add_argument("--peak_tflops", type=positive_float, help="of a card, to show its utilisation")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="type of the arithmetic")
    group.add_argument(
        "--amp_level", choices=("O1", "O2"), default="O1", help="O2: low-precision weights with float32 masters"
    )
    group.add_argument(
        "--local_rank", type=int, default=-1, help="accepted for old commands; paddle.distributed.launch sets the rank"
    )

    group = parser.add_argument_group("several cards")
    group.add_argument("--sharding_degree", type=positive_int, default=1, help="cards that share an optimizer's state")
    group.add_argument(
        "--sharding_stage", type=int, choices=(1, 2), default=1, help="2: they share gradients, too (ZeRO 2)"
    )
    group.add_argument(
        "--collective_timeout", type=positive_float, default=1800.0, help="seconds a card waits for idle others"
    )

    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=non_negative_float, default=1e-4, help="learning rate after warm-up")
    group.add_argument(
        "--scale_lr", action=Flag, help="multiply the learning rate by the number of samples per optimizer step"
    )
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="`constant` has no warm-up")
    group.add_argument("--lr_warmup_steps", type=non_negative_int, default=500, help="optimizer steps of warm-up")
    group.add_argument("--use_8bit_adam", action=Flag, help="keep AdamW's moments in 8 bits: a quarter of their memory")
    group.add_argument("--adam_beta1", type=unit_float, default=0.9, help="decay of AdamW's first moment")
    group.add_argument("--adam_beta2", type=unit_float, default=0.999, help="decay of AdamW's second moment")
    group.add_argument("--adam_weight_decay", type=non_negative_float, default=weight_decay, help="decoupled decay")
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="added to AdamW's denominator")
    group.add_argument("--max_grad_norm", type=positive_float, default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--use_ema", action=Flag, help="keep a moving average of the weights; it is the final result")
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


def add_lora_arguments(parser, targets, rank=4):
    """The LoRA layers that learn, read by the LoRA jobs."""
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
