"""Flags that the training scripts share, in titled groups, and the parser that reads them.

A script builds its parser from the groups it needs and adds its own. The parser also takes `--config file.yaml`, whose
keys are the flags' names (the command line wins), and answers every mistake with one line and status 2.
"""

from ppdiffusers_train.arguments.jobs import (
    INTERPOLATION_MODES,
    add_diffusion_arguments,
    add_distillation_arguments,
    add_flow_matching_arguments,
    add_image_arguments,
    add_kandinsky_arguments,
    add_lora_arguments,
    add_pipeline_arguments,
    add_student_arguments,
    add_timestep_arguments,
)
from ppdiffusers_train.arguments.output import (
    add_output_arguments,
    add_reporting_arguments,
    add_validation_arguments,
)
from ppdiffusers_train.arguments.parser import (
    ArgumentParser,
    Flag,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
    unit_float,
)

__all__ = [  # for scripts, beside the groups below
    "ArgumentParser", "Flag", "INTERPOLATION_MODES", "add_diffusion_arguments", "add_distillation_arguments",
    "add_flow_matching_arguments", "add_image_arguments", "add_kandinsky_arguments", "add_lora_arguments",
    "add_pipeline_arguments", "add_student_arguments", "add_timestep_arguments", "add_output_arguments",
    "add_reporting_arguments", "add_validation_arguments",
]  # fmt: skip

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
