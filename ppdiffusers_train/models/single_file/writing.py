"""A pipeline written into a single file, one tensor at a time."""

from pathlib import Path

import numpy as np

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.single_file.families import FAMILIES, SD1, SD2, SD3, SDXL, Family
from ppdiffusers_train.models.single_file.predictions import marks
from ppdiffusers_train.models.single_file.reading import PROJECTION, identity
from ppdiffusers_train.models.single_file.rules import to_single_file
from ppdiffusers_train.models.weights import written_tensors
from ppdiffusers_train.tensor_files import as_array, dtype_of, write_tensors

TIED = "encoder.embed_tokens.weight"  # T5's second name of `shared.weight`


def export_single_file(file, pipeline_class: str, parts: dict, own: dict) -> list:
    """Write a pipeline into a single file.

    Args:
        file: the file.
        pipeline_class, parts, own: see `pipeline_folder.export_pipeline`.
    Returns:
        What the format cannot hold, and what programs cannot read: lines for the user.
    Raises:
        UserError: the pipeline has no single-file layout, or has tensors that the layout has no place for.
    """
    family = family_of_pipeline(pipeline_class, parts)
    tensors = {}
    for part, (start, make_rules) in family.parts.items():
        if part in parts:
            inside = part_tensors(family, part, *parts[part], own.get(part))
            found, unknown = to_single_file(inside, make_rules(inside, False))
            if unknown:
                raise UserError(
                    f"{part}: {unknown[0]} has no place in a single file of {family.title} ({len(unknown)} such)"
                )
            tensors |= {start + name: tensor for name, tensor in found.items()}
    scheduler = own["scheduler"].config if "scheduler" in own else parts["scheduler"][0].config("scheduler")
    marked, named = marks(scheduler, family is SDXL)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, {**tensors, **marked}, {**metadata(family), **named})
    return lost(family, scheduler, tensors)


def family_of_pipeline(pipeline_class: str, parts: dict) -> Family:
    """The family of a pipeline. SD 2.x has a text encoder of OpenCLIP, SD 1.x that of CLIP, with another activation."""
    families = [family for family in FAMILIES if family.pipeline_class == pipeline_class]
    if not families:
        raise UserError(
            f"a {pipeline_class} has no single-file layout; expected one of the families of Stable Diffusion"
        )
    if SD1 in families:
        activation = parts["text_encoder"][0].config("text_encoder").get("hidden_act", "quick_gelu")
        return SD1 if activation == "quick_gelu" else SD2
    return families[0]


def part_tensors(family: Family, part: str, folder, name: str, part_class, own) -> dict:
    """`{name: tensor}` of a part as diffusers has it."""
    model, tensors, dtypes = (own, None, {}) if own is not None else folder.unloaded(name, part_class)
    inside = written_tensors(model, tensors, dtypes, for_torch=True)
    inside.pop(TIED, None)
    if family is SD2 and part == "text_encoder":
        # Unused, but readers see from it how wide the encoder is.
        width = inside["text_model.embeddings.position_embedding.weight"]
        inside[PROJECTION] = identity(width.shape[1], dtype_of(width))
    return inside


def metadata(family: Family) -> dict:
    """The entries of a single file's metadata by which other programs know what it is."""
    return {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": family.architecture}


def lost(family: Family, scheduler, tensors: dict) -> list:
    """What a single file does not hold, or programs do not read, in words."""
    words = ["without the scheduler's configuration and the tokenizers, which other programs have"]
    if scheduler.get("prediction_type") == "v_prediction":
        words[0] += "; set them to v-prediction"
    if scheduler.get("rescale_betas_zero_snr"):
        words.append("without the zero terminal SNR of its noise schedule: set programs, and the next base, to it")
    if family is SD2:
        words.append("without the last layer of the text encoder, which SD 2.x does not use")
    projection = tensors.get(f"text_encoders.clip_l.transformer.{PROJECTION}") if family is SD3 else None
    if projection is not None and not np.array_equal(as_array(projection), np.eye(projection.shape[0])):
        words.append("diffusers takes the first text encoder's projection for the identity, which it is not")
    return words
