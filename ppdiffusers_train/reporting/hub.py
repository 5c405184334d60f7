"""Upload of a result to the hub, with a model card that shows validation images."""

import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ppdiffusers_train.errors import RunError, UserError, writing

# Files of a run that are not part of its result.
NOT_UPLOADED = ["*checkpoint-*", "*checkpoint-*/*", "earlier-result*/*", "logs/*", "log/*", "encoded/*"]
NOT_UPLOADED += ["validation/*", "validation-over-steps/*", "result.json", ".*"]


def check_hub_name(directory: Path, repo_id) -> None:
    """Raise a `UserError` for a repository's name that cannot be."""
    flag = "--hub_model_id" if repo_id else "--output_dir, the name of the repository without --hub_model_id"
    try:
        validate_repo_id(repository_name(directory, repo_id))
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{flag}: no repository can have this name ({reason}); expected one such as owner/name"
        ) from error


def check_hub_login(token) -> None:
    """Raise a `UserError` when an upload at the end of the run would fail for lack of a token."""
    if not (token or huggingface_hub.get_token()):
        raise UserError(
            "--push_to_hub: no token; expected the environment variable HF_TOKEN, or `huggingface-cli login`"
        )


def open_repository(directory: Path, repo_id, token) -> str:
    """Create the repository for a result, if there is none, and return its name with its owner.

    Raises:
        UserError: the hub does not let this token write there, or cannot be reached.
    """
    check_hub_login(token)
    try:
        api = huggingface_hub.HfApi(token=token)
        return api.create_repo(repository_name(directory, repo_id), exist_ok=True).repo_id
    except (OSError, ValueError) as error:
        raise UserError(
            f"--push_to_hub: {huggingface_hub.constants.ENDPOINT} refused ({str(error).splitlines()[0]}); expected a "
            "token that may write to the repository, or no --push_to_hub: `ppdiffusers-train push` uploads it later"
        ) from error


def repository_name(directory: Path, repo_id) -> str:
    """The repository for a result: the one that is given, or one with the name of its folder."""
    return repo_id or directory.resolve().name


def model_card(name: str, card_data: dict, prompts, picture) -> str:
    """The text of a README.md for the hub: metadata, prompts, and the validation grid where there is one."""
    data = huggingface_hub.ModelCardData(library_name="ppdiffusers", pipeline_tag="text-to-image", **card_data)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        "Fine-tuned with `ppdiffusers_train` on PaddlePaddle.",
        "",
    ]
    if prompts and picture:
        lines += [f"![validation]({picture})", "", "Prompts, one row each:", ""]
        lines += [f"* {prompt}" for prompt in prompts]
    return "\n".join(lines) + "\n"


def push_to_hub(directory, repo_id, token, card_data: dict, prompts) -> str:
    """Write the model card into `directory` and upload it with the result. Returns the repository's address.

    Raises:
        RunError: the hub refused, or the model card cannot be written; the result stays in `directory`.
    """
    pictures = sorted((directory / "validation").glob("step-*.png"), key=lambda path: int(path.stem.split("-")[1]))
    name = repository_name(directory, repo_id)
    card = model_card(name.split("/")[-1], card_data, prompts, pictures and "validation_grid.png")
    with writing("--push_to_hub: the model card", directory, "the result is complete, but not uploaded"):
        if pictures:
            shutil.copyfile(pictures[-1], directory / "validation_grid.png")
        (directory / "README.md").write_text(card, encoding="utf-8")
    api = huggingface_hub.HfApi(token=token)
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=directory,
            ignore_patterns=NOT_UPLOADED,
            commit_message="Upload the fine-tuned model",
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"--push_to_hub: {huggingface_hub.constants.ENDPOINT} refused ({str(error).splitlines()[0]}); "
            f"the result is in {directory}"
        ) from error
    return str(repository)
