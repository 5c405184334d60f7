"""In which layout a file of LoRA layers stores its matrices: torch's, or Paddle's, which has them transposed.

Names and metadata decide. Only where they say nothing do the shapes, those of all layers of the file together.
"""

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.lora_names import PEFT_PREFIX
from ppdiffusers_train.tensor_files import Converted

TORCH, PADDLE = "torch", "Paddle"


def stated_layout(keys, metadata: dict):
    """The layout that the names of a file's tensors or its metadata state; None if nothing does."""
    if any(".lora_down." in key or ".lora_up." in key or key.startswith(PEFT_PREFIX) for key in keys):
        return TORCH  # only kohya's and PEFT's files have such names, whatever else the metadata says
    return {"pd": PADDLE, "pt": TORCH}.get(metadata.get("format"))


def guessed_layout(file, pairs: list) -> str:
    """The layout of a file that does not state it.

    Args:
        pairs: (layer, A, B) of all layers that have both.
    Raises:
        UserError: no layout fits all layers, or both do and the ranks do not tell which one it is.
    """
    fitting = [layout for layout in (TORCH, PADDLE) if all(rank_of(layout, *pair[1:]) for pair in pairs)]
    if not fitting:
        wrong = next((pair for pair in pairs if not any(rank_of(x, *pair[1:]) for x in (TORCH, PADDLE))), pairs[0])
        raise mismatch(file, *wrong)
    # A rank is hardly ever above both sides of a layer. Where the shapes alone decide, that is no layout.
    likely = [layout for layout in fitting if all(is_likely(layout, *pair[1:]) for pair in pairs)]
    if all(len(down.shape) == 4 for _, down, _ in pairs):  # kernels are alike in both
        return TORCH
    if len(likely) != 1:
        layer, down, up = next(pair for pair in pairs if len(pair[1].shape) == 2)
        raise UserError(
            f"{file}: {layer} has matrices of {tuple(down.shape)} and {tuple(up.shape)}, from which the rank cannot be "
            "told; expected the format pt or pd in the file's metadata"
        )
    return likely[0]


def rank_of(layout: str, down, up):
    """The rank of two matrices or kernels in a layout; None if they have none in common."""
    kinds = len(down.shape), len(up.shape)
    if kinds not in ((2, 2), (4, 4)) or 0 in (*down.shape, *up.shape) or list(up.shape[2:]) not in ([], [1, 1]):
        return None
    if layout == TORCH or kinds == (4, 4):
        return down.shape[0] if down.shape[0] == up.shape[1] else None
    return down.shape[1] if down.shape[1] == up.shape[0] else None


def is_likely(layout: str, down, up) -> bool:
    """Whether the rank of a layer is at most its larger side; below that for a square layer, where both layouts fit."""
    if len(down.shape) == 4:
        return True
    sides = (down.shape[1], up.shape[0]) if layout == TORCH else (down.shape[0], up.shape[1])
    rank = rank_of(layout, down, up)
    return rank < max(sides) or (rank == max(sides) and sides[0] != sides[1])


def in_torch_layout(file, layer: str, down, up, layout: str) -> tuple:
    """A and B of a layer, as torch stores them.

    Raises:
        UserError: they are no two matrices or kernels with a rank in common.
    """
    if rank_of(layout, down, up) is None:
        raise mismatch(file, layer, down, up)
    if layout == TORCH or len(down.shape) == 4:
        return down, up
    return tuple(Converted(part, part.dtype, transposed=True) for part in (down, up))


def mismatch(file, layer: str, down, up) -> UserError:
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    return UserError(f"{file}: {layer} has matrices of {shapes}, which have no rank in common")
