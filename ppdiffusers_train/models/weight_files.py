"""Which files of a folder hold a model's weights.

Large weights are sharded: `<stem>-00001-of-00002.safetensors` and so on, with an index `<stem>.safetensors.index.json`
that lists which tensor is in which file. Names of variants have one more word, and libraries disagree where:
`<stem>.fp16-00001-of-00002.safetensors` (transformers, diffusers from 0.31), `<stem>-00001-of-00002.fp16.safetensors`
(diffusers before), `<stem>.safetensors.index.fp16.json`, `<stem>.safetensors.fp16.index.json`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tensor_files import open_tensors

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pdparams", ".bin")
PADDLE_NAMES = ("diffusion_paddle_model.safetensors", "model_state.pdparams")
TORCH_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin")
SHARED_NAME = "model.safetensors"  # used by paddlenlp and transformers; the file's metadata tells them apart
NAMES = (*PADDLE_NAMES, SHARED_NAME, *TORCH_NAMES)  # of several kinds the first is taken
_SHARD = re.compile(r"-\d+-of-\d+")


@dataclass(frozen=True)
class FileName:
    """The parts of a weights file's name, or of its index's name."""

    kind: str  # the name without all the rest, one of NAMES
    variant: str | None
    shard: str  # such as `-00001-of-00002`, or ""
    is_index: bool

    @property
    def plain(self) -> str:
        """The file's name without a variant, which all libraries understand."""
        stem, suffix = self.kind.split(".")
        return f"{stem}{self.shard}.{suffix}"


def parse_name(name: str):
    """The `FileName` of a file of weights or an index, or None for any other file."""
    shard = _SHARD.search(name)
    stem, *words = _SHARD.sub("", name).split(".")
    is_index = "index" in words and words[-1] == "json"
    suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in words), "")
    variant = [word for word in words if word != suffix[1:] and not (is_index and word in ("index", "json"))]
    if stem + suffix not in NAMES or not (is_index or name.endswith(suffix)):
        return None
    return FileName(stem + suffix, ".".join(variant) or None, shard.group() if shard else "", is_index)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, of whatever kind, or is an index of them."""
    return name.endswith(SUFFIXES) or parse_name(name) is not None


def choose_weights(names, variant=None) -> list:
    """The names of one kind of weights and their index among a folder's files: of `variant`, or else without one."""
    parsed = {name: parse_name(name) for name in sorted(names)}
    for wanted in dict.fromkeys((variant, None)):
        for kind in NAMES:
            found = [name for name, file in parsed.items() if file and (file.kind, file.variant) == (kind, wanted)]
            if found:
                return found
    return []


class WeightFiles:
    """The files with a model's weights.

    Args:
        folder: the folder that they are in.
        names: names of the files, and of the index where there is one.
    Raises:
        UserError: one is missing; the message names it.
    """

    def __init__(self, folder, names: list):
        self.folder = Path(folder)
        self.files = [self.folder / name for name in names if not parse_name(name).is_index]
        self.indices = [self.folder / name for name in names if parse_name(name).is_index]
        self.kind = parse_name(names[0]).kind
        self._check()

    def _check(self):
        first = self.files[0].name if self.files else ""
        if self.indices:
            present, named = {file.name for file in self.files}, set(self._index()["weight_map"].values())
            for name in sorted(named - present):
                raise UserError(f"{self.folder / name} is missing; {self.indices[0].name} names it")
            for name in sorted(present - named):
                raise UserError(f"{self.folder / name} is not in {self.indices[0].name}; expected one or the other")
        elif len(self.files) > 1 or parse_name(first).shard:
            raise UserError(f"{self.folder / self.kind}.index.json is missing, the index of {first}")

    def _index(self) -> dict:
        try:
            content = json.loads(self.indices[0].read_text(encoding="utf-8"))
            if not all(isinstance(name, str) for name in content["weight_map"].values()) or not content["weight_map"]:
                raise ValueError("it names no files")
            return content
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.indices[0]} cannot be read as an index of weights: {error!r}") from error

    @property
    def is_pickled(self) -> bool:
        """Whether they are pickles, which libraries read by running what they say."""
        return not self.kind.endswith(".safetensors")

    @property
    def is_torch(self) -> bool:
        """Whether they are in torch's layout."""
        if self.kind == SHARED_NAME:
            return open_tensors(self.files[0])[1].get("format", "pt") == "pt"
        return self.kind in TORCH_NAMES

    def tensors(self) -> dict:
        """`{name: tensor}` of the files, as they lie there. Each tensor is read on access."""
        by_file = {file.name: open_tensors(file)[0] for file in self.files}
        if self.indices:
            index, weight_map = self.indices[0].name, self._index()["weight_map"]
            for name, file in weight_map.items():
                if name not in by_file[file]:
                    raise UserError(f"{self.folder / file} does not hold {name}, as {index} says")
            for file, tensors in by_file.items():
                if unnamed := sorted(tensors.keys() - weight_map.keys()):
                    raise UserError(f"{self.folder / file} holds {unnamed[0]}, which {index} does not name")
        return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}

    def link_plainly(self, target: Path, link) -> None:
        """Link the weights into `target` under names without a variant, which every library finds.

        Args:
            link: `link(file, path)` makes `path` a link to a file.
        """
        for file in self.files:
            link(file.resolve(), target / parse_name(file.name).plain)
        if self.indices:
            content = self._index()
            plain = {tensor: parse_name(name).plain for tensor, name in content["weight_map"].items()}
            text = json.dumps({"metadata": {}, **content, "weight_map": plain}, indent=2)
            (target / f"{self.kind}.index.json").write_text(text + "\n", encoding="utf-8")


def find_weights(folder, variant=None):
    """The `WeightFiles` of a folder, or None where it has none.

    Raises:
        UserError: they are incomplete.
    """
    names = choose_weights((path.name for path in Path(folder).iterdir()), variant)
    return WeightFiles(folder, names) if names else None


def files_of(folder: Path, weights) -> list:
    """The files of a part: its configuration and `WeightFiles`; where it has no weights, all."""
    if weights is None:
        return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [folder / CONFIG, *weights.files, *weights.indices]


def remove_weights(folder) -> None:
    """Delete all weights in a folder and their indices."""
    for path in Path(folder).iterdir():
        if parse_name(path.name):
            path.unlink()
