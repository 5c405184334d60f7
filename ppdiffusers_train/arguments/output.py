"""Flags of what a run writes and logs, in titled groups; `arguments/__init__.py` has those that all runs need."""

from ppdiffusers_train.arguments.parser import Flag, positive_int, share

SAVE_FORMATS = ("ppdiffusers", "diffusers")
PIPELINE_FORMATS = (*SAVE_FORMATS, "single_file")  # of jobs that write a pipeline which has such a layout


def add_output_arguments(parser, output_dir, save_formats=SAVE_FORMATS):
    """What is written where, read by the loop."""
    group = parser.add_argument_group("output and checkpoints")
    add = group.add_argument
    add(
        "--output_dir", default=output_dir, metavar="DIR",
        help="Write checkpoints, logs and the result to this folder.",
    )  # fmt: skip
    add(
        "--overwrite_output_dir", action=Flag,
        help="Replace the checkpoints and the result of an earlier run in output_dir; without it, the run is refused.",
    )  # fmt: skip
    add(
        "--save_format", choices=save_formats, default="ppdiffusers",
        help="Write the result for this library; `single_file`, of jobs that write a pipeline of Stable Diffusion, is "
        "for ComfyUI and WebUIs.",
    )  # fmt: skip
    add(
        "--save_dtype", choices=("float32", "float16", "bfloat16"),
        help="Write all weights of the result in this dtype; without it, trained weights are written in float32 and "
        "copied ones keep theirs.",
    )  # fmt: skip
    add("--checkpointing_steps", type=positive_int, default=500, help="Write a checkpoint every N optimizer steps.")
    add(
        "--checkpoints_total_limit", type=positive_int,
        help="Keep only the newest N checkpoints; without it, all are kept.",
    )  # fmt: skip
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
        help="Resume from this checkpoint: a folder, the name of one in output_dir, or `latest`; without it, the run "
        "begins at step 0.",
    )  # fmt: skip
    add(
        "--accept_changed_data", action=Flag,
        help="Resume with other data than the checkpoint's: the run goes on by samples seen, and epochs are those of "
        "the new data; without it, other data is refused.",
    )  # fmt: skip
    add(
        "--stop_signal", choices=("USR1", "USR2"),
        help="Treat this signal, which a scheduler sends as a warning, like SIGTERM: stop the run with a checkpoint.",
    )  # fmt: skip
    return group


def add_validation_arguments(parser, num_validation_images=1, validation_epochs=5):
    """Images generated during training and the loss of samples that are not trained on, read by the loop."""
    group = parser.add_argument_group("validation")
    add = group.add_argument
    add(
        "--validation_prompts", "--validation_prompt", nargs="+", metavar="TEXT",
        help="Generate images of these prompts during training; without them, no images are generated.",
    )  # fmt: skip
    lines = "Generate images of the prompts in this file as well: a JSON object per line, with prompt, and if needed "
    lines += "negative_prompt, seed, width, height, guidance_scale and num_inference_steps."
    add("--validation_prompts_file", metavar="FILE", help=lines)
    add(
        "--num_validation_images", type=positive_int, default=num_validation_images,
        help="Generate this many images per prompt.",
    )  # fmt: skip
    add(
        "--validation_epochs", type=positive_int, default=validation_epochs,
        help="Generate validation images every N epochs, and at the end.",
    )  # fmt: skip
    add(
        "--validation_steps", type=positive_int,
        help="Generate validation images every N optimizer steps instead, and at the end.",
    )  # fmt: skip
    steps = "Generate validation images in this many denoising steps."
    add("--validation_inference_steps", type=positive_int, default=25, help=steps)
    add(
        "--validation_loss_steps", type=positive_int, metavar="N",
        help="Report the mean loss of samples that are not trained on every N optimizer steps, before the first and "
        "after the last one, as validation/loss.",
    )  # fmt: skip
    add(
        "--validation_data_dir", metavar="DIR",
        help="Take these samples from this folder; without it and --validation_split, from the split validation of the "
        "data.",
    )  # fmt: skip
    add(
        "--validation_split", type=share, metavar="X",
        help="Take this share of the data instead, chosen at random by --seed, and train on the rest.",
    )  # fmt: skip
    return group


def add_reporting_arguments(parser):
    """Where metrics are logged, read by the loop."""
    group = parser.add_argument_group("logging")
    add = group.add_argument
    add(
        "--report_to", choices=("visualdl", "tensorboard", "wandb", "all", "none"), default="visualdl",
        help="Log metrics to this tracker; `all` uses every one that is installed.",
    )  # fmt: skip
    add("--logging_dir", default="logs", metavar="DIR", help="Write logs to this folder, below output_dir.")
    add("--tracker_project_name", default="text2image-fine-tune", help="Log to this project of wandb.")
    add("--debug_loss", action=Flag, help="Log the loss of each file as loss_for/<name>.")
    add("--push_to_hub", action=Flag, help="Upload the result to the hub when the run has ended.")
    add(
        "--hub_token", metavar="TOKEN",
        help="Upload with this token, which is safer in the environment variable HF_TOKEN.",
    )  # fmt: skip
    add("--hub_model_id", help="Upload to this repository; without it, to one with the name of output_dir.")
    return group
