"""A pipeline in a single file, read as if it were a folder: its weights come from the file, one tensor at a time, all
else from the folder of a configuration."""

import contextlib
import re
from pathlib import Path

import numpy as np

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.models.single_file.families import FAMILIES, SD1, SD2, SD3, family_of, vae_of, what_else
from ppdiffusers_train.models.single_file.latent_diffusion import vae_rules
from ppdiffusers_train.models.single_file.predictions import prediction_of
from ppdiffusers_train.models.single_file.rules import to_folder
from ppdiffusers_train.tensor_files import Computed, dtype_of, open_tensors

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
FILE = "model.safetensors"  # in the folder of a result
NO_SINGLE_FILE = ("model_index.json", "config.json")  # a folder with one of these is a pipeline or a model
CONFIG_FLAG = "--single_file_config"
# Tensors that are no weights: tables that the libraries compute, and what only training or CLIP's own loss needs.
NO_WEIGHTS = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask|embed_tokens\.weight)$|^loss\.|^model_ema\.")
PROJECTION = "text_projection.weight"  # published SD3 files have none for the first encoder: it is the identity
AVERAGE = "model_ema."  # moving averages of the UNet's weights, in files of the first trainers
SCHEDULE = re.compile(
    r"^(alphas_cumprod|betas|sqrt_|log_one_minus|posterior_|logvar|lvlb_weights|denoiser\.|scale_factor|v_pred|ztsnr)"
)


def find_single_file(name_or_path):
    """The path of the single file that a base's name stands for; None if it stands for something else. It is the name
    of a file, or of the folder of a result that is one."""
    path = Path(name_or_path)
    if path.is_dir():
        is_result = (path / FILE).is_file() and not any((path / name).exists() for name in NO_SINGLE_FILE)
        return path / FILE if is_result else None
    return path if path.is_file() or path.suffix in SUFFIXES else None


def open_file(file, flag: str) -> tuple:
    """`({name: tensor}, metadata)` of a single file, whatever it holds; nothing of a pickled one is run.

    Raises:
        UserError: it cannot be read.
    """
    if not Path(file).is_file():
        raise UserError(f"{flag}: {str(file)!r} is not a file")
    try:
        return open_tensors(file, any_name=True)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


class SingleFileWeights:
    """Weights of one part, for the callers of `WeightFiles`."""

    is_torch, is_pickled, indices = True, False, ()

    def __init__(self, file, tensors: dict):
        self.files, self._tensors = [Path(file)], tensors

    def tensors(self) -> dict:
        """`{name in a folder: tensor}`, in torch's layout. Each tensor is read on access."""
        return dict(self._tensors)


class SingleFile(PipelineFolder):
    """A pipeline whose weights are in a single file.

    Args:
        file: the file.
        flag: the flag that named it, for messages.
        parts: the parts that are needed. Those that are missing in the file come from the configuration's folder.
        pipeline_class: the name of the pipeline's class that is expected.
        config: folder, or name on the hub, of a pipeline of the same family: its configurations and tokenizers are
            used. By default the published model's.
        cache_dir: of its download.
        weights: see `PipelineFolder`.
    Raises:
        UserError: the file is of another family, or cannot be used.
    """

    def __init__(self, file, flag, parts, pipeline_class, config=None, cache_dir=None, weights=True):
        tensors, metadata, self.family = open_pipeline_file(file, flag)
        if self.family.pipeline_class != pipeline_class:
            expected = " or ".join(family.title for family in FAMILIES if family.pipeline_class == pipeline_class)
            raise UserError(f"{flag}: {str(file)!r} is a file of {self.family.title}; expected one of {expected}")
        self._open(file, flag, config or self.family.configuration, parts, cache_dir, weights)
        if self.index().get("_class_name") != pipeline_class:
            found = self.index().get("_class_name")
            raise UserError(f"{CONFIG_FLAG}: {self.configuration!r} is a {found}; expected a {pipeline_class}")
        self._check_prediction(prediction_of(tensors, metadata))
        self.stored = {part: SingleFileWeights(file, found) for part, found in self._parts(tensors) if found}
        describe(self, tensors)

    def _open(self, file, flag, config, parts, cache_dir, weights):
        try:
            super().__init__(config, CONFIG_FLAG, parts, cache_dir=cache_dir, weights=False)
        except UserError as error:
            raise UserError(f"{flag}: {str(file)!r} needs configurations and tokenizers: {error}") from error
        self.configuration, self.borrowed = self.name_or_path, set()
        self.flag, self.name_or_path, self.wants_weights = flag, str(file), weights

    def prediction_type(self) -> str:
        """What the UNet predicts, as the configuration's scheduler says."""
        return self.config("scheduler").get("prediction_type", "epsilon")

    def _check_prediction(self, named):
        if named and named != self.prediction_type():
            raise self._error(
                f"says that it predicts {named}, the scheduler of {self.configuration!r} {self.prediction_type()}; "
                f"expected a {CONFIG_FLAG} whose scheduler/scheduler_config.json has this prediction_type"
            )

    def _parts(self, tensors):
        for part, (start, make_rules) in self.family.parts.items():
            if part in self.folders:
                inside = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
                yield part, self._translate(part, inside, make_rules)

    def _translate(self, part, inside: dict, make_rules) -> dict:
        inside = {name: tensor for name, tensor in inside.items() if not NO_WEIGHTS.search(name)}
        if self.family is SD2 and part == "text_encoder":
            inside = used_layers(inside, self.config(part).get("num_hidden_layers"))
        found, unknown = to_folder(inside, make_rules(inside, True))
        if unknown:
            raise self._error(f"has {unknown[0]} in its {part}, which no {self.family.title} has ({len(unknown)} such)")
        embedding = found.get("text_model.embeddings.position_embedding.weight")
        if self.family is SD3 and part == "text_encoder" and embedding is not None and len(embedding.shape) == 2:
            found.setdefault(PROJECTION, identity(embedding.shape[1], dtype_of(embedding)))
        return found

    def weights(self, part: str):
        """See `PipelineFolder`; of a part that the file does not have, those in the configuration's folder."""
        if part in self.stored:
            return self.stored[part]
        found = super().weights(part)
        if found and part not in self.borrowed:
            self.borrowed.add(part)
            print(f"{self.name_or_path}: has no {part.replace('_', ' ')}; that of {self.configuration} is used")
        return found

    def _existing_weights(self, part):
        if self.weights(part) is None:
            ways = {"vae": "--pretrained_vae_model_name_or_path, or ", "text_encoder_3": "--no_t5, or "}.get(part, "")
            raise self._error(
                f"has no {part.replace('_', ' ')}; expected {ways}{CONFIG_FLAG} with the folder of a whole pipeline"
            )
        return super()._existing_weights(part)

    @contextlib.contextmanager
    def _naming(self, part):
        try:
            with super()._naming(part):
                yield
        except UserError as error:
            if part in self.stored and self.configuration not in str(error):
                raise UserError(
                    f"{error} (its configuration is that of {self.configuration}: {CONFIG_FLAG})"
                ) from error
            raise

    def export(self, part: str, part_class, target: Path, save_format: str) -> None:
        """See `PipelineFolder`."""
        if part in self.stored:
            self.export_converted(part, part_class, target, save_format)
        else:
            super().export(part, part_class, target, save_format)


class SingleFileVAE(SingleFile):
    """A VAE from a single file, alone or in a whole model.

    Args:
        base: the pipeline that it is used in, whose VAE has the same configuration.
    """

    def __init__(self, file, flag, base: PipelineFolder):
        tensors, _ = open_file(file, flag)
        self.folders, self.path, self.family = {"vae": base.folders["vae"]}, base.path, SD1
        self.flag, self.name_or_path, self.variant, self.wants_weights = flag, str(file), None, base.wants_weights
        self.configuration = str(base.folders["vae"])
        found = vae_of(tensors)
        if not found:
            raise self._error(f"has no VAE in the original layout: it is {what_else(tensors) or 'of an unknown kind'}")
        self.stored = {"vae": SingleFileWeights(file, self._translate("vae", found, vae_rules))}


def open_pipeline_file(file, flag: str) -> tuple:
    """`({name: tensor}, metadata, Family)` of a file. A `UserError` names what it is if it is of no family."""
    tensors, metadata = open_file(file, flag)
    try:
        return tensors, metadata, family_of(tensors)
    except UserError as error:
        titles = ", ".join(family.title for family in FAMILIES)
        raise UserError(f"{flag}: {str(file)!r} is {error}; a base can be a file of {titles}") from error


def describe(opened: SingleFile, tensors: dict) -> None:
    """Print what a file is taken for, and which of its tensors are left out."""
    family = opened.family
    kind = f", which predicts {opened.prediction_type()}" if family is SD2 else ""
    print(f"{opened.name_or_path}: {family.title}; configuration and tokenizers of {opened.configuration}{kind}")
    starts = tuple(start for start, _ in family.parts.values())
    averages = [name for name in tensors if name.startswith(AVERAGE)]
    if averages:
        print(f"{opened.name_or_path}: left out {len(averages)} moving averages (EMA) of the training that made it")
    others = [
        name for name in tensors if not (name.startswith(starts) or NO_WEIGHTS.search(name) or SCHEDULE.match(name))
    ]
    if others:
        print(f"{opened.name_or_path}: left out {len(others)} tensors that are no part of it, such as {others[0]}")


def used_layers(inside: dict, layers: int) -> dict:
    """The tensors of SD 2.x's text encoder without its last layer and its projection, which the model does not use."""
    unused = (f"transformer.resblocks.{layers}.", "text_projection")
    return {name: tensor for name, tensor in inside.items() if not name.startswith(unused)}


def identity(size: int, dtype) -> Computed:
    """The unit matrix."""
    return Computed(dtype, [size, size], lambda: np.eye(size).astype(dtype))
