"""Flags of what a run writes and logs, in titled groups; `arguments/__init__.py` has those that all runs need."""

from ppdiffusers_train.arguments.parser import Flag, positive_int


def add_output_arguments(parser, output_dir):
    """What is written where, read by the loop."""
    group = parser.add_argument_group("output and checkpoints")
    add = group.add_argument
    add("--output_dir", default=output_dir, metavar="DIR", help="Folder for checkpoints, logs and the result.")
    add(
        "--overwrite_output_dir", action=Flag,
        help="Replace the checkpoints and the result of an earlier run in output_dir; without it, the run is refused.",
    )  # fmt: skip
    add(
        "--save_format", choices=("ppdiffusers", "diffusers"), default="ppdiffusers",
        help="Library that the result is written for.",
    )  # fmt: skip
    add(
        "--save_dtype", choices=("float32", "float16", "bfloat16"),
        help="Dtype of all weights in the result; without it, trained weights are written in float32 and copied ones "
        "keep theirs.",
    )  # fmt: skip
    add("--checkpointing_steps", type=positive_int, default=500, help="Write a checkpoint every N optimizer steps.")
    add("--checkpoints_total_limit", type=positive_int, help="Keep only the newest N checkpoints.")
    add(
        "--final_checkpoint", action=Flag, default=True,
        help="Write a checkpoint after the last step, too, from which the run can be continued with more steps.",
    )  # fmt: skip
    add(
        "--on_save_error", choices=("stop", "continue"), default="stop",
        help="Stop or continue when a checkpoint cannot be written.",
    )  # fmt: skip
    add(
        "--resume_from_checkpoint", metavar="DIR",
        help="Resume from this checkpoint: a folder, the name of one in output_dir, or `latest`.",
    )  # fmt: skip
    add(
        "--stop_signal", choices=("USR1", "USR2"),
        help="Signal of a scheduler's warning; it stops the run with a checkpoint, as SIGTERM does.",
    )  # fmt: skip
    return group


def add_validation_arguments(parser, num_validation_images=1, validation_epochs=5):
    """Images generated during training, read by the loop."""
    group = parser.add_argument_group("validation")
    add = group.add_argument
    add(
        "--validation_prompts", "--validation_prompt", nargs="+", metavar="TEXT",
        help="Generate images of these prompts during training.",
    )  # fmt: skip
    add(
        "--num_validation_images", type=positive_int, default=num_validation_images,
        help="Number of images per prompt.",
    )  # fmt: skip
    add(
        "--validation_epochs", type=positive_int, default=validation_epochs,
        help="Generate validation images every N epochs, and at the end.",
    )  # fmt: skip
    add(
        "--validation_steps", type=positive_int,
        help="Generate validation images every N optimizer steps instead, and at the end.",
    )  # fmt: skip
    add(
        "--validation_inference_steps", type=positive_int, default=25,
        help="Number of denoising steps for a validation image.",
    )  # fmt: skip
    return group


def add_reporting_arguments(parser):
    """Where metrics are logged, read by the loop."""
    group = parser.add_argument_group("logging")
    add = group.add_argument
    add(
        "--report_to", choices=("visualdl", "tensorboard", "wandb", "all", "none"), default="visualdl",
        help="Tracker that metrics are logged to; `all` uses every one that is installed.",
    )  # fmt: skip
    add("--logging_dir", default="logs", metavar="DIR", help="Folder for logs, below output_dir.")
    add("--tracker_project_name", default="text2image-fine-tune", help="Project name in wandb.")
    add("--debug_loss", action=Flag, help="Log the loss of each file as loss_for/<name>.")
    add("--push_to_hub", action=Flag, help="Upload the result to the hub when the run has ended.")
    add("--hub_token", help="Token for the upload; it is safer in the environment variable HF_TOKEN.")
    add("--hub_model_id", help="Repository to upload to; without it, one with the name of output_dir.")
    return group
