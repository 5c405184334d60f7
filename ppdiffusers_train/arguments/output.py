"""Flags of what a run writes and shows, in titled groups; `arguments.py` has the others."""

from ppdiffusers_train.arguments.parser import Flag, positive_int


def add_output_arguments(parser, output_dir):
    """What is written where, read by the loop."""
    group = parser.add_argument_group("output and checkpoints")
    group.add_argument("--output_dir", default=output_dir, metavar="DIR", help="where everything is written")
    group.add_argument(
        "--save_format", choices=("ppdiffusers", "diffusers"), default="ppdiffusers", help="library to write it for"
    )
    group.add_argument(
        "--save_dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of all numbers in the result; default: float32 for what has learned, what is copied as it was",
    )
    group.add_argument("--checkpointing_steps", type=positive_int, default=500, help="a checkpoint every N steps")
    group.add_argument("--checkpoints_total_limit", type=positive_int, help="keep only the newest N checkpoints")
    group.add_argument(
        "--on_save_error", choices=("stop", "continue"), default="stop", help="when a checkpoint cannot be written"
    )
    group.add_argument(
        "--resume_from_checkpoint", metavar="DIR", help="a checkpoint's folder, its name in output_dir, or `latest`"
    )
    group.add_argument(
        "--stop_signal", choices=("USR1", "USR2"), help="stops a run as SIGTERM does: what a scheduler warns with"
    )
    return group


def add_validation_arguments(parser, num_validation_images=1, validation_epochs=5):
    """Pictures drawn during training, read by the loop."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation_prompts", "--validation_prompt", nargs="+", metavar="TEXT", help="draw these while training"
    )
    group.add_argument(
        "--num_validation_images", type=positive_int, default=num_validation_images, help="pictures per prompt"
    )
    group.add_argument(
        "--validation_epochs", type=positive_int, default=validation_epochs, help="draw every N epochs, and at the end"
    )
    group.add_argument("--validation_steps", type=positive_int, help="draw every N steps instead")
    group.add_argument(
        "--validation_inference_steps", type=positive_int, default=25, help="denoising steps of a validation picture"
    )
    return group


def add_reporting_arguments(parser):
    """Where the run's figures go, read by the loop."""
    group = parser.add_argument_group("reporting")
    group.add_argument(
        "--report_to",
        choices=("visualdl", "tensorboard", "wandb", "all", "none"),
        default="visualdl",
        help="`all` reports to those that are installed",
    )
    group.add_argument("--logging_dir", default="logs", metavar="DIR", help="below output_dir")
    group.add_argument("--tracker_project_name", default="text2image-fine-tune", help="project name in wandb")
    group.add_argument("--debug_loss", action=Flag, help="report the loss of each file, as loss_for/<name>")
    group.add_argument("--push_to_hub", action=Flag, help="upload the result when the run has ended")
    group.add_argument("--hub_token", help="token for the upload; better kept in the environment variable HF_TOKEN")
    group.add_argument("--hub_model_id", help="repository to upload to; by default the name of output_dir")
    return group
