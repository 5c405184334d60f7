"""Flags of the training scripts, in titled groups, and the parser that reads them.

A script builds its parser from the groups it needs and adds its own. The parser also takes `--config file.yaml`, whose
keys are the flags' names (the command line wins), and reports every mistake in one line with exit status 2.
"""

from ppdiffusers_train.arguments.diffusion import (
    add_diffusion_arguments,
    add_dream_arguments,
    add_flow_matching_arguments,
    add_prediction_arguments,
    add_timestep_arguments,
)
from ppdiffusers_train.arguments.jobs import (
    INTERPOLATION_MODES,
    add_crop_arguments,
    add_distillation_arguments,
    add_folder_arguments,
    add_image_arguments,
    add_kandinsky_arguments,
    add_kandinsky_lora_arguments,
    add_lora_arguments,
    add_mask_arguments,
    add_pipeline_arguments,
    add_student_arguments,
    add_text_encoder_arguments,
)
from ppdiffusers_train.arguments.optimizer import add_optimizer_arguments
from ppdiffusers_train.arguments.output import (
    PIPELINE_FORMATS,
    SAVE_FORMATS,
    add_output_arguments,
    add_reporting_arguments,
    add_validation_arguments,
)
from ppdiffusers_train.arguments.parser import (
    ArgumentParser,
    Flag,
    colour,
    non_negative_int,
    positive_float,
    positive_int,
    repeats,
    seed,
    separator,
    text,
)

__all__ = [  # for scripts, besides the groups below
    "ArgumentParser", "Flag", "INTERPOLATION_MODES", "add_crop_arguments", "add_diffusion_arguments",
    "add_distillation_arguments", "add_dream_arguments", "add_folder_arguments", "add_flow_matching_arguments",
    "add_image_arguments", "add_kandinsky_arguments", "add_kandinsky_lora_arguments", "add_lora_arguments",
    "add_mask_arguments", "add_pipeline_arguments", "add_prediction_arguments", "add_student_arguments",
    "add_text_encoder_arguments", "add_timestep_arguments", "add_output_arguments",
    "add_reporting_arguments", "add_validation_arguments", "PIPELINE_FORMATS", "SAVE_FORMATS",
]  # fmt: skip


def add_run_arguments(parser, output_dir, save_formats=SAVE_FORMATS, class_images=True, **defaults):
    """What every job has: data, training, output, validation and logging; `defaults` are other defaults of theirs.

    `class_images` is for jobs that can learn a subject.
    """
    add_data_arguments(parser)
    if class_images:
        add_class_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser, output_dir, save_formats)
    add_validation_arguments(parser)
    add_reporting_arguments(parser)
    parser.set_defaults(**defaults)


def add_data_arguments(parser):
    """Where the samples come from, read by `data.dataset.build_dataset`."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset_name", help="Train on this dataset of the hub, or on the tables of this folder or file.")
    add("--dataset_config_name", help="Use this configuration of the dataset, if it has several.")
    add("--dataset_split", default="train", metavar="SPLIT", help="Train on this split of a table, such as validation.")
    add(
        "--train_data_dir", "--instance_data_dir", metavar="DIR",
        help="Train on the images of this folder, whose captions are in a metadata.jsonl, in text files beside them, "
        "or in --caption.",
    )  # fmt: skip
    add(
        "--repeats", nargs="+", type=repeats, metavar="N",
        help="Use each image of --train_data_dir this many times per epoch, or those of a sub-folder, such as cats=10 "
        "dogs=2; without it, once.",
    )  # fmt: skip
    add(
        "--train_shards_path_or_url", metavar="SHARDS",
        help="Train on tar shards in the WebDataset format: a folder, a file, a pattern such as "
        "photos-{000..031}.tar, an http(s) address, or pipe:COMMAND, which is run in a shell.",
    )  # fmt: skip
    add(
        "--stream_lanes", type=positive_int, default=8,
        help="Read this many streamed shards at a time, all GPUs together; with a multiple of the number of GPUs, "
        "each shard is downloaded by one GPU.",
    )  # fmt: skip
    add("--image_column", default="image", help="Read images from this column.")
    add(
        "--caption_column", default="text",
        help="Read captions from this column, or from this field of a shard's .json files.",
    )  # fmt: skip
    add_caption_arguments(group)
    add(
        "--max_train_samples", type=positive_int,
        help="Train on this many samples, chosen at random by --seed; without it, on all.",
    )  # fmt: skip
    add(
        "--cache_dir", metavar="DIR",
        help="Keep downloaded models and datasets in this folder; without it, in Hugging Face's cache.",
    )  # fmt: skip
    add(
        "--background_color", type=colour, default="white", metavar="COLOR",
        help="Put transparent pixels of images on this colour: a name of CSS, or #rrggbb (in quotes in --config).",
    )  # fmt: skip
    add(
        "--index_dir", metavar="DIR",
        help="Keep an index of the images (sizes, content hashes) in this folder, so that each image is read only "
        "once for it; without it, in --cache_dir or the user's cache.",
    )  # fmt: skip
    add(
        "--encoded_cache", action=Flag, default=None,
        help="Run the frozen encoders once per sample, store the results in output_dir/encoded, and train from them.",
    )  # fmt: skip
    add(
        "--encoded_cache_dir", metavar="DIR",
        help="Store encoded samples in this folder instead of output_dir/encoded, where several runs can use them; "
        "this also turns --encoded_cache on.",
    )  # fmt: skip
    add(
        "--cache_variants", type=positive_int, default=1,
        help="Store this many random variants (crop, flip, caption) of each sample in the cache.",
    )  # fmt: skip
    add(
        "--max_bad_samples", type=non_negative_int, default=0,
        help="Skip up to this many samples that cannot be used; the run stops at the next one.",
    )  # fmt: skip
    add(
        "--dataloader_num_workers", type=non_negative_int, default=0,
        help="Load images in this many threads; with 0, the main thread loads them.",
    )  # fmt: skip
    add("--resolution", type=positive_int, default=512, help="Train on images of this height and width, in pixels.")
    return group


def add_class_arguments(parser):
    """Prior preservation, as DreamBooth has it, read by the loop."""
    add = parser.add_argument_group("class images").add_argument
    add(
        "--class_data_dir", metavar="DIR",
        help="Train on the images of this folder beside each sample, so that the model keeps what it knows of their "
        "class; the base model generates those that are missing there.",
    )  # fmt: skip
    add("--class_prompt", type=text, metavar="TEXT", help="Give this caption to the class images.")
    add(
        "--num_class_images", type=positive_int, default=100,
        help="Use this many class images, also of a folder that has more.",
    )  # fmt: skip
    add(
        "--prior_loss_weight", type=positive_float, default=1.0,
        help="Multiply the mean loss of the class images by this weight.",
    )  # fmt: skip
    add(
        "--with_prior_preservation", action=Flag, default=None,
        help="Insist on class images, as diffusers' DreamBooth scripts do; the flags above are enough, and "
        "--no_with_prior_preservation ignores them.",
    )  # fmt: skip
    add(
        "--prior_generation_precision", choices=("no", "fp32", "fp16", "bf16"),
        help="Generate class images in this precision; without it, in that of --mixed_precision.",
    )  # fmt: skip
    add(
        "--sample_batch_size", type=positive_int,
        help="This flag has no effect: it is accepted for old commands, and class images are generated one at a time.",
    )  # fmt: skip
    add(
        "--set_grads_to_none", action=Flag, default=None,
        help="This flag has no effect: it is accepted for old commands, and gradients are always freed after a step.",
    )  # fmt: skip


def add_caption_arguments(group):
    """Captions of a folder beside those of metadata, read by `data.image_folder`, for tools as well."""
    add = group.add_argument
    add(
        "--caption", "--instance_prompt", type=text, metavar="TEXT",
        help="Give this caption to the images of a folder that have no other.",
    )  # fmt: skip
    add(
        "--caption_separator", type=separator, metavar="TEXT",
        help="Split text files into several captions at this text, such as \\n for one in each line; without it, each "
        "file is one caption.",
    )  # fmt: skip


def add_training_arguments(parser, weight_decay=0.01, train_batch_size=16):
    """Length, batch size, optimizer and precision of the run, read by the loop."""
    add = parser.add_argument_group("training").add_argument
    add(
        "--dry_run", action=Flag,
        help="Print what the run would do and how much memory it needs, then exit; no weights are loaded.",
    )  # fmt: skip
    add(
        "--seed", type=seed,
        help="Draw the run's random numbers from this seed; without it, one is chosen at random and printed.",
    )  # fmt: skip
    add(
        "--train_batch_size", type=positive_int, default=train_batch_size,
        help="Train on batches of this many samples on each GPU.",
    )  # fmt: skip
    add("--num_train_epochs", type=positive_int, default=100, help="Train for this many passes over the data.")
    add(
        "--max_train_steps", type=positive_int,
        help="Train for this many optimizer steps, whatever --num_train_epochs is; without it, --num_train_epochs "
        "decides.",
    )  # fmt: skip
    add(
        "--gradient_accumulation_steps", type=positive_int, default=1,
        help="Accumulate the gradients of this many batches per optimizer step on each GPU.",
    )  # fmt: skip
    add(
        "--gradient_checkpointing", action=Flag,
        help="Recompute activations in the backward pass, which takes less memory and more time.",
    )  # fmt: skip
    add(
        "--trainable_modules", metavar="PATTERNS",
        help="Train only these parts of the model in full, and LoRA layers if the job has them: names of layers or "
        "parameters, separated by commas, with * for anything, such as blocks.*.norm1,proj_out.",
    )  # fmt: skip
    add(
        "--enable_xformers_memory_efficient_attention", action=Flag,
        help="Use Paddle's memory-efficient attention if this Paddle and this device have it.",
    )  # fmt: skip
    add(
        "--attention_slices", choices=("no", "auto"), default="no",
        help="Compute attention in slices where its matrices are large and Paddle has no kernel without them (auto).",
    )  # fmt: skip
    add(
        "--skip_nonfinite", type=non_negative_int, default=0, metavar="N",
        help="Skip up to N steps whose loss or gradient is NaN or inf; the run stops at the next one.",
    )  # fmt: skip
    add("--deterministic", action=Flag, help="Use deterministic kernels on GPUs, which are slower.")
    add("--allow_tf32", action=Flag, help="Use TF32 in matrix products on GPUs of the Ampere generation or newer.")
    add("--to_static", action=Flag, help="Trace the trained models into graphs: the start is slower, steps are faster.")
    add(
        "--peak_tflops", type=positive_float,
        help="Compute utilisation from this peak of one GPU, in TFLOP/s; without it, that of known GPUs is used.",
    )  # fmt: skip
    add(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="no",
        help="Train in automatic mixed precision: fp16 and bf16 compute in 16 bits where that is safe; no stays in "
        "float32.",
    )  # fmt: skip
    add(
        "--amp_level", choices=("O1", "O2"), default="O1",
        help="Keep trained weights in float32 (O1), or in low precision with float32 master weights (O2).",
    )  # fmt: skip
    add(
        "--local_rank", type=int,
        help="This flag has no effect: it is accepted for old commands, and paddle.distributed.launch sets the rank.",
    )  # fmt: skip

    add = parser.add_argument_group("multiple GPUs").add_argument
    add(
        "--sharding_degree", type=positive_int, default=1,
        help="Shard the optimizer's state over this many GPUs, as in ZeRO; with 1, it is not sharded.",
    )  # fmt: skip
    add(
        "--sharding_stage", type=int, choices=(1, 2), default=1,
        help="Shard the optimizer's state (1), or gradients as well (2), as the stages of ZeRO do.",
    )  # fmt: skip
    add(
        "--collective_timeout", type=positive_float, default=1800.0,
        help="End the run when a rank has waited this many seconds for others that give no sign of life.",
    )  # fmt: skip

    return add_optimizer_arguments(parser, weight_decay)
