"""What a folder is that is given as a base, and is no pipeline; and what to do with it."""

from pathlib import Path

MODELS = ("unet", "unet_target", "prior", "transformer", "vae", "movq", "text_encoder", "text_encoder_2")
WEIGHTS = (".safetensors", ".pdparams", ".bin")


def describe(folder: Path) -> str:
    """Why a folder without model_index.json cannot be a base, as the end of a sentence that begins with its name."""
    names = {path.name for path in folder.iterdir()}
    if "state.json" in names:
        return (
            "is a checkpoint of a run, which --resume_from_checkpoint continues; expected a pipeline, as its result is"
        )
    if any("lora" in name and name.endswith(WEIGHTS) for name in names):
        return (
            "holds LoRA layers and no pipeline; expected the base that they were trained on, or that base with them "
            "merged into it (ppdiffusers-train lora merge)"
        )
    models = [name for name in MODELS if (folder / name / "config.json").is_file()]
    if models or "config.json" in names:
        what = ", ".join(f"{name}/" for name in models) or "one model"
        return (
            f"holds only {what} and no pipeline: it has no model_index.json; expected a whole pipeline: copy the "
            "folder of the base that it was trained from, and put it into the place of that model"
        )
    return "is not a pipeline: it has no model_index.json"
