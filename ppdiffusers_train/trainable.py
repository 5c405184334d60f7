"""Which parts of a job's models learn, where a flag chooses them."""

from fnmatch import fnmatchcase

from ppdiffusers_train.errors import UserError


def choose_trainable(module, patterns) -> dict:
    """Of the models in which something learns, let these parts learn in full, and nothing else but LoRA layers.

    Args:
        patterns: names of layers or parameters in such a model, with its own name before them or without, separated by
            commas; `*` is anything. None: what learns stays as it is.
    Returns:
        {pattern: size of what fits it}.
    Raises:
        UserError: a pattern fits nothing in these models.
    """
    if patterns is None:
        return {}
    sizes = {pattern.strip(): 0 for pattern in patterns.split(",")}
    learning = {
        name: model
        for name, model in module.named_children()
        if any(not parameter.stop_gradient for parameter in model.parameters())
    }
    for model_name, model in learning.items():
        for name, parameter in model.named_parameters():
            if is_lora(name) or getattr(parameter, "stays_frozen", False):
                continue
            names = (name, f"{model_name}.{name}")
            fits = [p for p in sizes if any(fnmatchcase(n, p) or fnmatchcase(n, f"{p}.*") for n in names)]
            parameter.stop_gradient = not fits
            for pattern in fits:
                sizes[pattern] += parameter.size
    for pattern, size in sizes.items():
        if not size:
            known = ", ".join(
                f"{name}.{child}" for name, model in learning.items() for child, _ in model.named_children()
            )
            raise UserError(f"--trainable_modules: {pattern!r} fits nothing that can learn; there are {known}")
    return sizes


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA layer."""
    return ".lora_layer." in name
