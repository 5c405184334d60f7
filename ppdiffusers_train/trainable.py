"""Which parts of a job's models are trained, where a flag chooses them."""

from fnmatch import fnmatchcase

from ppdiffusers_train.errors import UserError


def keep_frozen(*parameters) -> None:
    """Take parameters out of training for good: statistics, or what the published model does not have.

    They also keep their float32 values whatever the run's precision.
    """
    for parameter in parameters:
        parameter.stop_gradient = parameter.stays_frozen = True


def choose_trainable(module, patterns) -> dict:
    """Of the models in which something is trained, train these parts in full, and nothing else but LoRA layers.

    What a job has frozen stays frozen; of a LoRA's frozen base any part may be chosen but what `keep_frozen` got.

    Args:
        patterns: names of layers or parameters in such a model, with its own name before them or without, separated by
            commas; `*` is anything. None: what is trained stays as it is.
    Returns:
        {pattern: size of what fits it}.
    Raises:
        UserError: a pattern fits nothing in these models.
    """
    if patterns is None:
        return {}
    sizes = {pattern.strip(): 0 for pattern in patterns.split(",")}
    trained = {
        name: model
        for name, model in module.named_children()
        if any(not parameter.stop_gradient for parameter in model.parameters())
    }
    for model_name, model in trained.items():
        parameters = dict(model.named_parameters())
        has_lora = any(map(is_lora, parameters))
        for name, parameter in parameters.items():
            frozen_by_job = parameter.stop_gradient and not has_lora
            if is_lora(name) or frozen_by_job or getattr(parameter, "stays_frozen", False):
                continue
            names = (name, f"{model_name}.{name}")
            fits = [p for p in sizes if any(fnmatchcase(n, p) or fnmatchcase(n, f"{p}.*") for n in names)]
            parameter.stop_gradient = not fits
            for pattern in fits:
                sizes[pattern] += parameter.size
    for pattern, size in sizes.items():
        if not size:
            known = ", ".join(
                f"{name}.{child}" for name, model in trained.items() for child, _ in model.named_children()
            )
            raise UserError(f"--trainable_modules: {pattern!r} fits nothing that can learn; there are {known}")
    return sizes


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA layer."""
    return ".lora_layer." in name
