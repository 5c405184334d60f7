"""Flags of single jobs, in titled groups: their models, images, distillation and LoRA layers. The jobs read them.

Scripts import them from `ppdiffusers_train.arguments`, like the flags that all runs need.
"""

from ppdiffusers_train.arguments.diffusion import add_dropout_arguments
from ppdiffusers_train.arguments.parser import Flag, non_negative_float, positive_float, positive_int, unit_float

INTERPOLATION_MODES = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest-exact")


def add_kandinsky_arguments(parser):
    """The two pipelines that Kandinsky 2.2 consists of, read by its jobs."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_decoder_model_name_or_path", default="kandinsky-community/kandinsky-2-2-decoder",
        help="Load the decoder pipeline (UNet, MoVQ, scheduler) from this folder or hub repository.",
    )  # fmt: skip
    group.add_argument(
        "--pretrained_prior_model_name_or_path", default="kandinsky-community/kandinsky-2-2-prior",
        help="Load the prior pipeline (CLIP's encoders, prior) from this folder or hub repository.",
    )  # fmt: skip
    add_variant_argument(group)
    return group


def add_variant_argument(group):
    """Which of several weights of a model is read, by all jobs."""
    group.add_argument("--variant", help="Load this variant of the weight files, such as fp16.")


def add_pipeline_arguments(parser):
    """The pipeline that a job starts from, read by the jobs of Stable Diffusion XL and 3."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_model_name_or_path", required=True,
        help="Fine-tune the pipeline of this folder, single .safetensors file or hub repository.",
    )  # fmt: skip
    group.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="Use the VAE of this folder, single .safetensors file or hub repository instead of the pipeline's.",
    )  # fmt: skip
    add_single_file_argument(group)
    group.add_argument("--revision", help="Use this revision of the pipeline on the hub.")
    add_variant_argument(group)
    return group


def add_folder_arguments(parser):
    """The same for pipelines that are published as folders only, read by the job of Qwen-Image."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_model_name_or_path", required=True,
        help="Fine-tune the pipeline of this folder or hub repository.",
    )  # fmt: skip
    group.add_argument("--revision", help="Use this revision of the pipeline on the hub.")
    add_variant_argument(group)
    return group


def add_single_file_argument(group):
    """Where the configurations and tokenizers of a base in a single file come from, read by the jobs and by tools."""
    group.add_argument(
        "--single_file_config", metavar="NAME",
        help="Take configurations and tokenizers of a single file from this pipeline's folder or hub repository; "
        "without it, from the published model of its family.",
    )  # fmt: skip


def add_image_arguments(parser):
    """How images are resized and cropped, read by the same jobs."""
    group = add_crop_arguments(parser)
    group.add_argument(
        "--aspect_ratio_buckets", action=Flag,
        help="Crop each image to the nearest of several sizes with as many pixels as resolution x resolution, instead "
        "of a square.",
    )  # fmt: skip
    group.add_argument(
        "--image_interpolation_mode", choices=INTERPOLATION_MODES, default="lanczos",
        help="Resize images with this interpolation.",
    )  # fmt: skip
    group.add_argument(
        "--min_image_size", type=positive_int, metavar="PIXELS",
        help="Treat images whose shorter side has fewer pixels as bad samples; without it, they are enlarged.",
    )  # fmt: skip
    add_mask_arguments(group)
    return group


def add_mask_arguments(group):
    """Masked losses, read by `data.dataset.build_dataset`, and by the jobs whose loss is over latents of the image."""
    add = group.add_argument
    add(
        "--masked_loss", action=Flag,
        help="Take the loss only where a sample's mask is white: cat.mask.png beside cat.jpg, in folders and shards.",
    )  # fmt: skip
    add("--mask_column", metavar="NAME", help="Take masks from this column, which holds images or their paths.")
    add("--alpha_mask", action=Flag, help="Take the transparency of images as their masks: the loss is of what shows.")
    add(
        "--masked_area_weight", "--unmasked_weight", type=unit_float, default=0.0, metavar="W",
        help="Weigh the loss outside masks by this number from 0 to 1; with 0, it does not count.",
    )  # fmt: skip


def add_crop_arguments(parser):
    """Crops and flips, read by all jobs that have them."""
    group = parser.add_argument_group("images")
    group.add_argument("--center_crop", action=Flag, help="Crop the centre; without it, crops are random.")
    group.add_argument("--random_flip", action=Flag, help="Flip images horizontally with probability 0.5.")
    return group


def add_distillation_arguments(parser):
    """The teacher, and how a student with few steps is distilled from it, read by the jobs of latent consistency."""
    models = parser.add_argument_group("models")
    add = models.add_argument
    add(
        "--pretrained_teacher_model", required=True,
        help="Load the teacher's pipeline from this folder, single .safetensors file or hub repository.",
    )  # fmt: skip
    add(
        "--pretrained_vae_model_name_or_path",
        help="Use the VAE of this folder, single .safetensors file or hub repository instead of the teacher's.",
    )  # fmt: skip
    add_single_file_argument(models)
    add("--teacher_revision", help="Use this revision of the teacher on the hub.")
    add("--revision", help="This flag is an older name of --teacher_revision.")
    add_variant_argument(models)
    add("--cast_teacher_unet", action=Flag, help="Cast the teacher to the dtype of --mixed_precision.")

    add = parser.add_argument_group("distillation").add_argument
    add(
        "--w_min", type=float, default=5.0,
        help="Draw the guidance w, a pipeline's guidance scale minus 1, uniformly between this value and --w_max.",
    )  # fmt: skip
    add("--w_max", type=float, default=15.0, help="Use this upper limit of the guidance w.")
    add(
        "--num_ddim_timesteps", type=positive_int, default=50,
        help="Divide the path of the teacher's DDIM solver into this many steps.",
    )  # fmt: skip
    add(
        "--loss_type", choices=("l2", "huber"), default="l2",
        help="Compare the predictions of student and target by this loss.",
    )  # fmt: skip
    add(
        "--huber_c", type=positive_float, default=0.001,
        help="Turn the Huber loss from quadratic to linear at this difference.",
    )  # fmt: skip
    add(
        "--timestep_scaling_factor", type=positive_float, default=10.0,
        help="Multiply timesteps by this factor in the boundary condition of the consistency function.",
    )  # fmt: skip

    group = add_crop_arguments(parser)
    group.add_argument(
        "--interpolation_type", choices=INTERPOLATION_MODES, default="bilinear",
        help="Resize images with this interpolation.",
    )  # fmt: skip
    add_dropout_arguments(group)
    group.add_argument(
        "--vae_encode_batch_size", type=positive_int, default=1,
        help="Encode this many samples together: more are faster on a GPU; with 1, a sample's encoding has the same "
        "bits in any batch.",
    )  # fmt: skip
    return group


def add_student_arguments(parser):
    """The student and its average, where they are models of their own, read by the same jobs."""
    group = parser.add_argument_group("student and target")
    group.add_argument(
        "--unet_time_cond_proj_dim", type=positive_int, default=256,
        help="Give the student's embedding of the guidance this many channels.",
    )  # fmt: skip
    group.add_argument(
        "--ema_decay", type=unit_float, default=0.95,
        help="Average the target network with this decay at each step.",
    )  # fmt: skip
    return group


def add_lora_arguments(parser, targets, rank=4, **defaults):
    """The LoRA layers that are trained, read by the LoRA jobs; `defaults` are those of other flags, with LoRA."""
    parser.set_defaults(**defaults)
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_rank", "--rank", type=positive_int, default=rank, help="Add LoRA layers of this rank.")
    group.add_argument(
        "--lora_alpha", type=positive_float,
        help="Scale the output of the LoRA layers by this alpha / rank; without it, alpha is the rank.",
    )  # fmt: skip
    group.add_argument(
        "--use_rslora", action=Flag,
        help="Scale the output of the LoRA layers by alpha / the square root of the rank (rsLoRA).",
    )  # fmt: skip
    group.add_argument(
        "--lora_dropout", type=unit_float, default=0.0,
        help="Drop elements of the LoRA layers' input with this probability (dropout).",
    )  # fmt: skip
    group.add_argument(
        "--lora_target_modules", default=targets, metavar="NAMES",
        help="Add LoRA to the layers whose names end like this; separate several ends by commas.",
    )  # fmt: skip
    group.add_argument(
        "--init_lora", metavar="PATH",
        help="Start from the LoRA of this file or folder; without it, training starts at the base model.",
    )  # fmt: skip
    group.add_argument(
        "--quantize_base", choices=("no", "int8", "nf4"), default="no",
        help="Keep the frozen weights of the base model in 8 bits (int8) or 4 bits (nf4) in memory; no keeps them in "
        "float32 or --mixed_precision.",
    )  # fmt: skip
    group.add_argument(
        "--lora_plus_ratio", type=positive_float, default=1.0,
        help="Train the second matrix of LoRA layers, which begins as zeros, at this multiple of the learning rate.",
    )  # fmt: skip
    return group


def add_text_encoder_arguments(group):
    """LoRA on text encoders, read by the LoRA jobs that can train them."""
    group.add_argument(
        "--train_text_encoder", action=Flag, help="Train LoRA layers on the pipeline's text encoders as well."
    )
    group.add_argument(
        "--text_encoder_lr", type=non_negative_float,
        help="Train the text encoders with this learning rate; without it, with --learning_rate.",
    )  # fmt: skip


def add_kandinsky_lora_arguments(parser, targets):
    """The same for the jobs of Kandinsky 2.2, with their defaults of other flags. Returns the parser."""
    defaults = {"output_dir": "kandi_2_2-model-finetuned-lora", "num_validation_images": 4, "validation_epochs": 1}
    add_lora_arguments(parser, targets, **defaults)
    return parser
