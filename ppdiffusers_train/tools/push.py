"""`ppdiffusers-train push`: uploads a result to the hub, as `--push_to_hub` of the training scripts does."""

from pathlib import Path


def add_push_command(commands) -> None:
    """Add the command `push` to `ppdiffusers-train`."""
    command = commands.add_parser(
        "push", help="upload the result of a run to the hub",
        description="Upload the result in the output folder of a run to the hub, with the model card of --push_to_hub. "
        "Exit status 1: the hub refused, or cannot be reached. Status 2: the command is wrong.",
    )  # fmt: skip
    add = command.add_argument
    add("folder", metavar="DIR", help="Upload the result in this --output_dir of a training script.")
    add("--hub_model_id", help="Upload to this repository; without it, to one with the name of DIR.")
    add(
        "--hub_token", metavar="TOKEN",
        help="Upload with this token, which is safer in the environment variable HF_TOKEN.",
    )  # fmt: skip
    command.set_defaults(run=push_result)


def push_result(args) -> None:
    """Upload a result.

    Raises:
        UserError: the folder has no complete result, or the repository's name cannot be.
        RunError: the hub refused.
    """
    from ppdiffusers_train.reporting.hub import check_hub_login, check_hub_name, push_to_hub
    from ppdiffusers_train.runtime.run_folder import ARGUMENTS_FILE, read_json, require_result

    folder = Path(args.folder)
    require_result(folder)
    check_hub_name(folder, args.hub_model_id)
    check_hub_login(args.hub_token)
    record = read_json(folder / ARGUMENTS_FILE) or {}
    prompts = record.get("arguments", {}).get("validation_prompts")
    print(f"uploaded to {push_to_hub(folder, args.hub_model_id, args.hub_token, record.get('card', {}), prompts)}")
