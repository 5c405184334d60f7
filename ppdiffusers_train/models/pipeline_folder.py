"""Pipelines on disk, written by ppdiffusers or by diffusers. A folder's files show which layout it has.

A pipeline folder has one folder per part (`unet/`, `movq/`, `scheduler/`, …). A part with weights is in Paddle's layout
or in torch's (linear weights transposed); ppdiffusers 0.29.0 has an option for it, and fails with an unclear
message if that is wrong.
"""

import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ppdiffusers
from huggingface_hub import constants
from ppdiffusers import schedulers
from ppdiffusers.schedulers.scheduling_utils import SchedulerMixin

from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.hub_folders import UNREACHABLE, cached, download, is_other, reason_of
from ppdiffusers_train.models.no_pipeline import describe
from ppdiffusers_train.models.own_type import compute_in_own_type
from ppdiffusers_train.models.part_settings import require_tokens
from ppdiffusers_train.models.unloaded import build_unloaded
from ppdiffusers_train.models.weight_files import CONFIG, NAMES, files_of, find_weights, parse_name, remove_weights
from ppdiffusers_train.models.weight_names import fitting_tensors
from ppdiffusers_train.models.weights import load_model, save_model, unloaded_copy

TRANSFORMERS = {"ppdiffusers": "ppdiffusers.transformers", "diffusers": "transformers"}
# What libraries raise on files that are damaged, or not what their names say.
BROKEN = (AssertionError, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
LIBRARY_VERSIONS = {
    "ppdiffusers": ppdiffusers.__version__,
    "diffusers": "0.29.2",
}  # the versions whose files ours were compared with


@dataclass(frozen=True)
class StoredModel:
    """A model that has not been loaded yet.

    Args:
        load: returns the model.
        files: with its configuration and its weights.
    """

    load: Callable
    files: tuple


class PipelineFolder:
    """A pipeline's folder, on this disk or from the hub.

    Args:
        name_or_path: a folder, or a repository on the hub.
        flag: the flag that named it, for messages.
        parts: the parts that are needed; an alias is the name of a part in a combined pipeline, where another part may
            have its usual name (`{"prior": "prior_prior"}`).
        cache_dir, revision: of a download.
        variant: of the weights' files, such as `fp16`; parts without that variant are taken as they are.
        weights: whether to load them. If not, models have shapes but no values, and nothing is downloaded.
    Raises:
        UserError: it does not exist, is no pipeline, or lacks a part.
    """

    is_cached = False  # whether it is what the hub's cache has of it, perhaps not all

    def __init__(self, name_or_path, flag, parts, aliases=None, **options):
        aliases = aliases or {}
        self._find(name_or_path, flag, [*parts, *aliases.values()], **options)
        if not (self.path / "model_index.json").is_file():
            raise self._error(describe(self.path))
        self.folders = {}
        for part in parts:
            found = [name for name in (aliases.get(part), part) if name and (self.path / name).is_dir()]
            if not found:
                has = sorted(child.name for child in self.path.iterdir() if child.is_dir())
                raise self._error(f"has no part {part!r}; it has {', '.join(has) or 'no parts'}")
            self.folders[part] = self.path / found[0]

    def _find(self, name_or_path, flag, parts, cache_dir=None, revision=None, variant=None, weights=True):
        self.flag, self.name_or_path, self.variant, self.wants_weights = flag, str(name_or_path), variant, weights
        self.path = Path(name_or_path)
        if not self.path.is_dir():
            self.path = self._from_hub(parts, cache_dir, revision)
        names = {path.name for path in self.path.rglob("*")}
        if variant and not any(file and file.variant == variant for file in map(parse_name, names)):
            print(f"{flag}: {self.name_or_path!r} has no weights of --variant {variant}; those without one are used")

    def _error(self, found):
        note = "; this copy in the hub's cache may be incomplete, and is completed by a run that reaches the hub"
        return UserError(f"{self.flag}: {self.name_or_path!r} {found}{note if self.is_cached else ''}")

    def _from_hub(self, parts, cache_dir, revision):
        if os.path.isabs(self.name_or_path) or self.name_or_path.count("/") != 1:
            if self.path.is_file():
                raise self._error("is a file; expected a folder, as ppdiffusers-train convert makes of a single file")
            raise self._error("is not a folder; expected a pipeline's folder or a hub name such as owner/model")
        try:
            return download(self.name_or_path, parts, cache_dir, revision, self.variant, self.wants_weights)
        except UNREACHABLE as error:
            reason, folder = reason_of(error), cached(self.name_or_path, cache_dir, revision)
            if folder is None:
                raise self._error(
                    f"is not a folder here and cannot be downloaded from {constants.ENDPOINT} ({reason}), nor is it in "
                    "the cache; expected a pipeline's folder, or set HF_ENDPOINT to a mirror that can be reached"
                ) from error
            print(f"{self.flag}: {self.name_or_path!r} is taken from {folder}: the hub was not reached ({reason})")
            self.is_cached = True
            return folder

    def config(self, part: str) -> dict:
        """The JSON configuration of a part, without loading its weights."""
        for name in (CONFIG, "scheduler_config.json", "preprocessor_config.json"):
            if (self.folders[part] / name).is_file():
                return self._read(self.folders[part] / name)
        raise self._error(f"has no configuration in {self.folders[part].name}/")

    def index(self) -> dict:
        """The pipeline's model_index.json."""
        return self._read(self.path / "model_index.json")

    def _read(self, file: Path) -> dict:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return {**content}
        except (OSError, ValueError, TypeError) as error:
            raise self._error(f"has a {file.name} that cannot be read: {file}: {error}") from error

    def scheduler_class(self, part: str):
        """The class that the pipeline's model_index.json gives a scheduler."""
        entry = self.index().get(self.folders[part].name)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        found = getattr(schedulers, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
            raise self._error(f"has a {self.folders[part].name} of class {name!r}; expected a scheduler of ppdiffusers")
        return found

    def weights(self, part: str):
        """The `WeightFiles` of a part, or None where it has none.

        Raises:
            UserError: they are not complete.
        """
        try:
            return find_weights(self.folders[part], self.variant)
        except UserError as error:
            raise self._error(f"is not complete: {error}") from error

    def is_torch(self, part: str) -> bool:
        """Whether a part's weights are in torch's layout."""
        files = self.weights(part)
        return files is not None and files.is_torch

    def later(self, part: str, part_class) -> StoredModel:
        """The part as an object that is loaded later. A `UserError` if it has no weights, or not all."""
        weights = self._existing_weights(part) if self.wants_weights else None
        return StoredModel(lambda: self.load(part, part_class), tuple(files_of(self.folders[part], weights)))

    def files(self, part: str) -> list:
        """The files that a part depends on."""
        return files_of(self.folders[part], self.weights(part))

    def load(self, part: str, part_class):
        """The part as an object of `part_class`, its weights as float32.

        Raises:
            UserError: it has no weights, or they are damaged, of another model, or pickles of more than numbers.
        """
        folder = str(self.folders[part])
        with self._naming(part):
            if not hasattr(part_class, "parameters"):  # schedulers, tokenizers, image processors
                return require_tokens(part_class.from_pretrained(folder))
            if not self.wants_weights:
                return compute_in_own_type(build_unloaded(part_class, folder))
            model = load_model(part_class, folder, self._existing_weights(part), part)
        model.eval()
        return_free_memory()
        return compute_in_own_type(model)

    @contextlib.contextmanager
    def _naming(self, part):
        """A context in which whatever libraries raise on a part's files is an error that names the part."""
        try:
            yield
        except UserError as error:
            if str(error).startswith(f"{self.flag}: "):
                raise
            raise self._error(f"has a {self.folders[part].name}/ that cannot be loaded: {error}") from error
        except BROKEN as error:
            reason = f"{type(error).__name__}: {error}"
            raise self._error(f"has a {self.folders[part].name}/ that cannot be loaded: {reason}") from error

    def _existing_weights(self, part):
        files = self.weights(part)
        if files is None:
            names = map(parse_name, (path.name for path in self.folders[part].iterdir()))
            variants = sorted({file.variant for file in names if file})
            instead = f"only --variant {' or '.join(variants)}" if variants else f"expected {NAMES[0]}, {NAMES[1]}, …"
            raise self._error(f"has no weights in {self.folders[part].name}/; {instead}")
        return files

    def export(self, part: str, part_class, target: Path, save_format: str) -> None:
        """Make `target` an unchanged copy of a part for the library `save_format`.

        Files are hard links where the disk allows. Only weights in the other library's layout and pickled ones are
        converted; they keep their dtype.
        """
        files = self.weights(part)
        if files is None or (files.is_torch == (save_format == "diffusers") and not files.is_pickled):
            self.check_weights(part, part_class)
            link_tree(self.folders[part], target)
            remove_weights(target)
            if files:
                files.link_plainly(target, link_file)
        else:
            self.export_converted(part, part_class, target, save_format)

    def check_weights(self, part: str, part_class) -> None:
        """Raise a `UserError` if a part whose class has weights has none, or not those of its configuration."""
        if hasattr(part_class, "parameters"):
            with self._naming(part):
                fitting_tensors(build_unloaded(part_class, str(self.folders[part])), self._existing_weights(part))

    def export_converted(self, part: str, part_class, target: Path, save_format: str) -> None:
        """Write a part for the library `save_format` from its tensors, one at a time."""
        model, tensors, dtypes = self.unloaded(part, part_class)
        save_model(model, target, save_format, dtypes, tensors=tensors)

    def unloaded(self, part: str, part_class) -> tuple:
        """A part as `weights.unloaded_copy` has it."""
        folder = str(self.folders[part])
        with self._naming(part):
            files = self._existing_weights(part)
            return unloaded_copy(part_class, folder, files, lambda: self.load(part, part_class))


class ModelFolder(PipelineFolder):
    """The folder of a single model, with weights and config.json at its top, or a pipeline's folder that has the model.

    Args:
        part: what to call the model, and its folder in a pipeline.
        class_name: the class that its configuration must name.
    """

    def __init__(self, name_or_path, flag, part, class_name, **options):
        self._find(name_or_path, flag, ["", part], **options)
        inside = self.path / part
        self.folders = {part: inside if inside.is_dir() else self.path}
        found = self.config(part).get("_class_name")
        if found != class_name:
            raise self._error(f"is a {found}; expected {class_name}")


def export_pipeline(directory, pipeline_class: str, parts: dict, own: dict, save_format: str, settings=()) -> None:
    """Write a pipeline's folder.

    Args:
        pipeline_class: its name in both libraries.
        parts: {name in the pipeline: (PipelineFolder, part in it, class)}.
        own: {name: model} of the parts that were trained; the others are copied.
        save_format: the library to write for, "ppdiffusers" or "diffusers".
        settings: other entries of its model_index.json.
    """
    directory = Path(directory)
    version = {f"_{save_format}_version": LIBRARY_VERSIONS[save_format]}
    index = {"_class_name": pipeline_class, **version, **dict(settings)}
    for name, (folder, part, part_class) in parts.items():
        if name in own and hasattr(own[name], "parameters"):
            save_model(own[name], directory / name, save_format)
        elif name in own:
            own[name].save_pretrained(str(directory / name))
        else:
            folder.export(part, part_class, directory / name, save_format)
        is_transformer = inspect.getmodule(part_class).__name__.startswith(("ppdiffusers.transformers", "paddlenlp"))
        library = TRANSFORMERS[save_format] if is_transformer else save_format
        index[name] = [library, part_class.__name__]
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def link_tree(source: Path, target: Path) -> None:
    """Copy a part's folder with hard links, without weights and code."""

    def ignored(_, names):
        return set(filter(is_other, names))

    shutil.copytree(source, target, copy_function=link_file, dirs_exist_ok=True, ignore=ignored)


def link_file(file, copy) -> None:
    """Make `copy` a hard link to a file, or a copy where the disk cannot link."""
    try:
        os.link(os.path.realpath(file), copy)
    except OSError:
        shutil.copy2(file, copy)
