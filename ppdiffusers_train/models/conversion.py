"""A whole pipeline written in another layout, tensor by tensor, without loading it."""

from pathlib import Path

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.models.part_settings import named_class
from ppdiffusers_train.models.pipeline_folder import PipelineFolder, export_pipeline
from ppdiffusers_train.models.single_file.families import Family
from ppdiffusers_train.models.single_file.reading import SingleFile, find_single_file, open_pipeline_file
from ppdiffusers_train.models.single_file.writing import export_single_file
from ppdiffusers_train.tensor_files import first_not_finite

SOURCE = "SOURCE"
NOT_CONVERTED = ("safety_checker", "feature_extractor")  # Stable Diffusion draws without them
OPTIONAL = ("text_encoder_3", "tokenizer_3")  # of SD3, which draws without them


def write_converted(source: str, to: str, target: Path, config=None, variant=None) -> list:
    """Write a pipeline for a library, or into a single file.

    Args:
        source: a pipeline's folder, its name on the hub, or a single file.
        to: "ppdiffusers", "diffusers" or "single_file".
        target: an empty folder or, of a single file, the new file.
        config: the `config` of a `SingleFile`.
        variant: of the weights of a folder, see `PipelineFolder`.
    Returns:
        What was written, and what the new layout cannot hold: lines for the user.
    Raises:
        UserError: the source is no pipeline that can be written so.
    """
    provide_joint_attention()  # which the model of SD3 needs to be built
    file = find_single_file(source)
    if file and variant:
        raise UserError(f"--variant: {source!r} is a single file, which has no variants")
    folder, index = open_single(file, config) if file else open_folder(source, variant)
    kind, left_out = str(index.get("_class_name")), [name for name in NOT_CONVERTED if is_part(index.get(name))]
    entries = {name: entry for name, entry in index.items() if name not in left_out and not name.startswith("_")}
    parts = {name: (folder, name, class_of(name, entry)) for name, entry in entries.items() if is_part(entry)}
    for name in parts:
        require_finite(folder, name)
    lines = [f"{kind} for {to}", *([f"without {', '.join(left_out)}"] if left_out else [])]
    if config and not file:
        lines.append(f"--single_file_config has no effect: {source!r} is not a single file")
    if to == "single_file":
        return lines + export_single_file(target, kind, parts, {})
    export_pipeline(target, kind, parts, {}, to, {name: entry for name, entry in entries.items() if name not in parts})
    return lines


def open_folder(source: str, variant=None) -> tuple:
    """`(PipelineFolder, its model_index.json)`."""
    index = PipelineFolder(source, SOURCE, []).index()
    parts = [name for name, entry in index.items() if is_part(entry) and name not in NOT_CONVERTED]
    return PipelineFolder(source, SOURCE, parts, variant=variant), index


def open_single(source: Path, config) -> tuple:
    """`(SingleFile, the model_index.json of its configuration)`; parts that the pipeline can do without are dropped
    where the file has none."""
    tensors, _, family = open_pipeline_file(source, SOURCE)
    index = PipelineFolder(config or family.configuration, "--single_file_config", [], weights=False).index()
    index = {name: entry for name, entry in index.items() if name not in NOT_CONVERTED}
    if is_missing(OPTIONAL[0], family, tensors):
        index |= {name: [None, None] for name in OPTIONAL if name in index}
    parts = [name for name, entry in index.items() if is_part(entry)]
    return SingleFile(source, SOURCE, parts, family.pipeline_class, config), index


def require_finite(folder: PipelineFolder, part: str) -> None:
    """Raise a `UserError` if the weights of a part have a NaN or an inf, which no copy should carry on."""
    files = folder.weights(part)
    name = first_not_finite(files.tensors()) if files else None
    if name:
        raise UserError(f"{SOURCE}: {part}: {name} has values that are NaN or inf; expected finite weights")


def is_missing(part: str, family: Family, tensors: dict) -> bool:
    """Whether a single file lacks a part that its family may have."""
    return part in family.parts and not any(name.startswith(family.parts[part][0]) for name in tensors)


def is_part(entry) -> bool:
    """Whether an entry of a model_index.json names the library and the class of a part."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def class_of(part: str, entry: list):
    """The class of a part, from its entry in a model_index.json of either library."""
    found = named_class(entry)
    if found is None:
        raise UserError(f"{SOURCE}: its {part} is a {entry[1]}, for which ppdiffusers has no class")
    return found
